"""Licences as the Hub knows them: https://huggingface.co/docs/hub/repositories-licenses."""

import difflib
import re

from hf_imitate.hub_cards.markdown import shortened

LICENSES = frozenset((
    "afl-3.0", "agpl-3.0", "apache-2.0", "apple-amlr", "apple-ascl", "artistic-2.0",
    "bigcode-openrail-m", "bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd", "bsd-2-clause",
    "bsd-3-clause", "bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc", "cc-by-2.0", "cc-by-2.5",
    "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0",
    "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0",
    "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0",
    "cdla-sharing-1.0", "creativeml-openrail-m", "deepfloyd-if-license", "ecl-2.0", "epl-1.0", "epl-2.0",
    "etalab-2.0", "eupl-1.1", "eupl-1.2", "fair-noncommercial-research-license", "gemma", "gfdl", "gpl",
    "gpl-2.0", "gpl-3.0", "grok2-community", "h-research", "intel-research", "isc", "lgpl", "lgpl-2.1",
    "lgpl-3.0", "lgpl-lr", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "lppl-1.3c",
    "mit", "mpl-2.0", "ms-pl", "ncsa", "odbl", "odc-by", "ofl-1.1", "openmdw-1.0", "openmdw-1.1",
    "openrail", "openrail++", "osl-3.0", "pddl", "postgresql", "unknown", "unlicense", "wtfpl", "zlib",
))  # fmt: skip
"""Ids that a card's `license` may have; any other licence is `other`, with a name of its own."""

OTHER = "other"
_MOST_NAME = 100  # characters


def license_metadata(name: str | None) -> tuple[str | None, str | None]:
    """
    Say a licence as the Hub reads it: by its id, or as `other` with a name.

    Args:
        name (`str`, *optional*):
            Anybody's word for a licence.

    Returns:
        `tuple`: what [`~huggingface_hub.ModelCardData`] calls `license` and `license_name`.
    """
    if name is None:
        return None, None
    known = name.strip().lower()
    if known in LICENSES:
        return known, None
    plain = "" if known == OTHER else re.sub(r"[^a-z0-9.+]+", "-", known[:_MOST_NAME]).strip("-.")
    return OTHER, plain or "not-stated"


def license_note(name: str) -> str | None:
    """
    What somebody who names a licence should know of it.

    Args:
        name (`str`):
            Their word for it.

    Returns:
        `str`, or `None` where it is one of the Hub's ids.

    Raises:
        ValueError: it is `"other"`, which names none.
    """
    _, given_name = license_metadata(name)
    if given_name is None:
        return None
    if name.strip().lower() == OTHER:
        raise ValueError(
            "`license` is 'other', which names none. Give the licence's own name: the card then says `other`, with it "
            "as `license_name`."
        )
    name = shortened(name, _MOST_NAME)
    near = difflib.get_close_matches(name.lower(), LICENSES, n=1)
    hint = f" Its nearest id is '{near[0]}'." if near else ""
    return (
        f"The Hub has no licence id {name!r}, so the card's metadata says `other`, named '{given_name}'."
        f"{hint} Put the licence's text into the repository as LICENSE."
    )
