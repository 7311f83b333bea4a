"""The long form of what the project claims: entries run by `make acceptance ONLY=<name>`, results as dated JSON."""
