"""Audits of any causal LM against what people wrote: one audit, one file, one function that returns findings."""
