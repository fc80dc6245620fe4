"""Find the layers to prune, group them into units, and list every other matrix with its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from wanda_lightning.common.words import check_patterns, matches, refuse_unmatched
from wanda_lightning.core.patterns import Pattern, Unstructured
from wanda_lightning.models.experts import stored_by_columns
from wanda_lightning.models.inventory import (
    Inventory,
    SkippedMatrix,
    SkipReason,
    Unit,
    skip_by_default,
    skip_packed,
    skip_unsupported,
)
from wanda_lightning.models.layers import Layer, layers_of
from wanda_lightning.models.module_names import named_modules, uncompiled_name
from wanda_lightning.models.quantized import is_packed, is_packed_weight, quantizer


def find_layers(
    model: nn.Module,
    sequential: str = "block",
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    pattern: Pattern = Unstructured(),
) -> Inventory:
    """Find the layers to prune, group them into units, and list every other matrix with its reason.

    `PruningConfig.from_names` describes the arguments; `sequential` is `"block"`, `"layer"` or `"none"`. Layers whose
    width does not fit the pattern are skipped. The weights are not read, so the model may be on the meta device. Raises
    a ValueError if a pattern in `skip` or `only` matches no matrix.
    """
    finder = _Finder(model)
    finder.sort_parameters()
    finder.skip_tied_to_skipped()
    finder.apply_user_patterns(check_patterns("skip", skip), check_patterns("only", only))
    finder.skip(SkipReason.UNSUPPORTED, lambda layer: "has no elements" if 0 in layer.shape else None)
    # Find blocks before the pattern removes layers: blocks must not depend on the pattern.
    blocks = finder.block_of_each_layer()
    finder.skip(SkipReason.PATTERN, lambda layer: pattern.why_not(layer.shape[1]))
    return Inventory(finder.units(sequential, blocks), tuple(finder.skipped), blocks)


class _Finder:
    """Sorts the parameters of a model into layers and skipped matrices."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = named_modules(model)
        self.layers: list[Layer] = []
        self.skipped: list[SkippedMatrix] = []
        self._defaults = skip_by_default(self.modules)
        self._by_columns = stored_by_columns(self.modules)
        self._module_names = {module: name or "weight" for name, module in self.modules.items()}
        self._aliases: dict[str, list[str]] = {}  # the other names of each tied matrix
        self._owners: dict[int, str] = {}  # the first name of each parameter, by its id
        for name, module in self.modules.items():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                self._owners.setdefault(id(module.weight), name)

    def sort_parameters(self) -> None:
        """Sort every matrix into the layers or the skipped matrices; the user's choices come later."""
        for full_name, buffer in self.model.named_buffers():
            name = uncompiled_name(full_name)
            if is_packed_weight(name, buffer):
                self.skipped.append(skip_packed(name, buffer, self.modules[name.rpartition(".")[0]]))
        for full_name, parameter in self.model.named_parameters(remove_duplicate=False):
            name = uncompiled_name(full_name)
            module_name = name.rpartition(".")[0]
            if isinstance(parameter, UninitializedParameter):
                detail = "has no shape yet: run one batch through the model first"
                self.skipped.append(SkippedMatrix(name, (), SkipReason.NO_SHAPE, detail))
            elif parameter.ndim >= 2 and module_name in self.modules:  # otherwise a second name of the same module
                self._sort(name, module_name, parameter)

    def _sort(self, name: str, module_name: str, parameter: Tensor) -> None:
        module, parameter_name = self.modules[module_name], name.rpartition(".")[2]
        label = module_name if parameter_name == "weight" and module_name else name
        default = self._defaults.get(module_name) if parameter_name == "weight" else None
        found = [] if default else layers_of(label, module, parameter_name, self.modules, self._by_columns)
        default = default or (self._defaults.get(module_name) if found else None)
        owner = self._owners.setdefault(id(parameter), label)
        shape = tuple(parameter.shape)
        if owner != label:
            self.skipped.append(SkippedMatrix(label, shape, SkipReason.TIED, f"tied to {owner}"))
            self._aliases.setdefault(owner, []).append(label)
            for part in found:  # experts, or groups of a convolution
                if suffix := part.name.removeprefix(label):
                    self._aliases.setdefault(owner + suffix, []).append(part.name)
        elif is_packed(parameter) or quantizer(module, parameter):
            self.skipped.append(skip_packed(label, parameter, module))
        elif default:
            self.skipped.append(SkippedMatrix(label, shape, *default))
        elif found:
            self.layers.extend(found)
        else:
            self.skipped.append(skip_unsupported(label, shape, module, parameter_name))

    def skip_tied_to_skipped(self) -> None:
        """Skip layers that share their parameter with a module that is skipped by default, such as the output head."""

        def tied(layer: Layer) -> str | None:
            other = next((name for name in self._aliases.get(layer.name, ()) if name in self._defaults), None)
            return None if other is None else f"tied to {other}: {self._defaults[other][1]}"

        self.skip(SkipReason.TIED, tied)

    def apply_user_patterns(self, skip: Sequence[str], only: Sequence[str]) -> None:
        """Skip the matrices that `skip` names and those that `only` does not name."""
        every = [layer.name for layer in self.layers] + [matrix.name for matrix in self.skipped]
        refuse_unmatched(skip, every, "skip", "matrix")
        refuse_unmatched(only, every, "only", "matrix")

        def by_user(matrix: Layer | SkippedMatrix) -> str | None:
            names = (matrix.name, *self._aliases.get(matrix.name, ()))
            for pattern in skip:
                if any(matches(name, pattern, "skip") for name in names):
                    return f"skip={pattern!r}"
            if only and not any(matches(name, pattern, "only") for name in names for pattern in only):
                return f"not in only={list(only)}"
            return None

        # The user's choice replaces every other reason: quantized weights that the user skips are not refused.
        self.skipped = [
            replace(matrix, reason=SkipReason.USER) if by_user(matrix) else matrix for matrix in self.skipped
        ]
        self.skip(SkipReason.USER, by_user)

    def skip(self, reason: SkipReason, detail_of: Callable[[Layer], str | None]) -> None:
        """Skip the layers for which `detail_of` returns a detail."""
        details = [(layer, detail_of(layer)) for layer in self.layers]
        self.layers = [layer for layer, detail in details if detail is None]
        self.skipped += [
            SkippedMatrix(layer.name, layer.stored_shape, reason, detail)
            for layer, detail in details
            if detail is not None
        ]

    def block_of_each_layer(self) -> dict[str, str]:
        """Map the name of each layer to the name of its block, or of its module if it lies in no block."""
        blocks, modules = find_blocks(self.modules, self.layers), self._module_names
        return {
            layer.name: next((name for name in blocks if layer.name.startswith(f"{name}.")), modules[layer.module])
            for layer in self.layers
        }

    def units(self, sequential: str, blocks: Mapping[str, str]) -> tuple[Unit, ...]:
        """Group the layers into units."""
        if sequential == "none":
            return (Unit("", None, tuple(self.layers)),) if self.layers else ()
        members: dict[str, list[Layer]] = {}
        for layer in self.layers:
            # Experts or groups of one parameter form one unit: batches can stop only at their module.
            name = blocks[layer.name] if sequential == "block" else self._module_names[layer.module]
            members.setdefault(name, []).append(layer)
        return tuple(Unit(name, self.modules.get(name, self.model), tuple(inner)) for name, inner in members.items())


def find_blocks(modules: Mapping[str, nn.Module], layers: Iterable[Layer]) -> list[str]:
    """Return the names of the blocks, given all modules by name and the layers to prune. No block lies inside another.

    The blocks of transformers have a base class of their own (`GradientCheckpointingLayer`). Elsewhere a block is a
    member of a list or sequence that contains at least two layers and no smaller such member: a stage that consists of
    blocks is not a block.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    # The number of distinct modules with layers inside each module.
    names = {layer.module: layer.name.split(".") for layer in layers}.values()
    counts = Counter(".".join(parts[:length]) for parts in names for length in range(len(parts)))
    marked = [name for name, m in modules.items() if isinstance(m, GradientCheckpointingLayer) and counts[name]]
    listed = [name for name in _members_of_lists(modules) if counts[name] >= 2 and name not in marked]
    candidates = marked + [
        name
        for name in listed
        if not any(name.startswith(f"{other}.") or other.startswith(f"{name}.") for other in marked)
    ]
    return [name for name in candidates if not any(other.startswith(f"{name}.") for other in candidates)]


def _members_of_lists(modules: Mapping[str, nn.Module]) -> list[str]:
    return [
        f"{name}.{child}" if name else child
        for name, container in modules.items()
        if _is_list(container) and not name.endswith("experts")
        for child, member in container.named_children()
        if not isinstance(member, nn.ModuleList | nn.Sequential)
    ]


def _is_list(container: nn.Module) -> bool:
    """Whether a module holds others in a sequence, as torchvision's backbones of detectors do in a dictionary."""
    return isinstance(container, nn.ModuleList | nn.Sequential) or type(container).__name__ == "IntermediateLayerGetter"
