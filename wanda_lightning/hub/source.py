"""Find the model that was pruned on the Hugging Face hub, and the metadata of its model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wanda_lightning.common.model_source import ModelSource

CARD_NAME = "README.md"
_KEPT = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True)
class Source:
    """The model that was pruned."""

    hub_id: str = ""  # its id on the hub, or the id of its base model; empty if neither is known
    metadata: Mapping[str, Any] = field(default_factory=dict)  # license and language, as in its model card
    is_derived: bool = False  # whether `hub_id` is the id of its base model


def find_source(model: ModelSource) -> Source:
    """Find the card of a model on this machine or on the hub. Unknown fields stay empty."""
    name = str(model).removeprefix("timm:")
    if name.startswith("hf-hub:"):
        return _on_hub(name.removeprefix("hf-hub:"), model)
    path = Path(name.removeprefix("local-dir:")).expanduser()
    if path.exists():
        return _in_folder(path if path.is_dir() else path.parent)
    return _in_timm(name) if name != str(model) else _on_hub(name, model)


def _in_folder(folder: Path) -> Source:
    """Read the card in a folder. A folder has no id of its own, but its card names the model that it derives from."""
    card = _metadata(folder / CARD_NAME)
    base = card.get("base_model")
    if isinstance(base, list) and len(base) == 1:
        (base,) = base
    base = base if isinstance(base, str) else ""
    return Source(base, _kept(card), is_derived=bool(base))


def _in_timm(name: str) -> Source:
    """Look up the pretrained weights of a timm model, which are on the hub."""
    import timm

    try:
        known = timm.get_pretrained_cfg(name)
    except RuntimeError:  # an unknown tag
        return Source()
    if known is None or not known.hf_hub_id:
        return Source()
    return Source(known.hf_hub_id, {"license": known.license} if known.license else {})


def _on_hub(name: str, model: ModelSource) -> Source:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        file = hf_hub_download(name, CARD_NAME, revision=model.revision, cache_dir=model.cache_dir)
        card = _metadata(Path(file))
    except GatedRepoError:
        return Source(name)
    except (HFValidationError, RepositoryNotFoundError):  # not on the hub, such as "vit (weights.safetensors)"
        return Source()
    except Exception:  # no card, or no connection: libraries of the network raise errors of many kinds
        return Source(name)
    kept = _kept(card)
    link = kept.get("license_link")
    if isinstance(link, str) and "://" not in link:
        kept["license_link"] = f"https://huggingface.co/{name}/blob/{model.revision}/{link}"
    return Source(name, kept)


def _metadata(card: Path) -> dict[str, Any]:
    """Return the metadata of a card; none if there is no card, or if it is damaged."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        return metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _kept(card: Mapping[str, Any]) -> dict[str, Any]:
    return {name: card[name] for name in _KEPT if name in card}
