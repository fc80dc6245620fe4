"""Private names of other libraries: one file uses each, for a reason, and the library still has it.

`USES` is what an upgrade of a library may break. A row leaves when a public way replaces the name, or names the new
file when the code moves. The scan is pragmatic: it takes `x._name`, `import _name`, the text `"_name"`, and methods
that nothing in the package calls, unless the same file defines the name.
"""

import ast
import inspect
import pkgutil
import re
from collections.abc import Iterator, Set
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "wanda_lightning"


class Use(NamedTuple):
    """Which file needs a private name, where the library has it, and what we need it for."""

    file: str
    owner: str
    purpose: str


USES = {
    # Copies and hooks of training
    "_average_model": Use(
        "callbacks/trainer.py",
        "lightning.pytorch.callbacks:WeightAveraging",
        "to find the averaged copies of a model, whose weights must be pruned with it",
    ),
    "_compiler_ctx": Use(
        "callbacks/distillation.py",
        "lightning.pytorch:LightningModule",
        "to refuse to distill a compiled module, whose forward would not see the teacher",
    ),
    "_generate_state_key": Use(
        "callbacks/pruning.py",
        "lightning.pytorch.callbacks:Callback",
        "to tell the states of several pruning callbacks apart in a checkpoint",
    ),
    "_iterator": Use(
        "callbacks/calibration_data.py",
        "torch.utils.data:DataLoader",
        "to give the copy of a loader no iterator, so that it does not advance the one of Lightning",
    ),
    "_on_before_batch_transfer": Use(
        "callbacks/calibration_data.py",
        "lightning.pytorch:LightningModule",
        "to run the hooks of a batch in the same order as Lightning",
    ),
    "_save_topk_checkpoint": Use(
        "callbacks/save.py",
        "lightning.pytorch.callbacks:ModelCheckpoint",
        "to write `last` although no checkpoint is among the best before pruning has ended",
    ),
    # How batches pass through a model
    "_C": Use("calibration/interception.py", "torch", "to recognize tensors of `torch.func`"),
    "_functorch": Use(
        "calibration/interception.py", "torch._C", "to recognize tensors of `torch.func`"
    ),
    "_compiled_call_impl": Use(
        "calibration/lockstep.py",
        "torch.nn:Module",
        "to let a compiled module use the forward at which samples wait",
    ),
    "_current_level": Use(
        "calibration/surroundings.py",
        "torch.autograd.forward_ad",
        "to refuse pruning inside of forward-mode differentiation",
    ),
    "_get_current_dispatch_mode_stack": Use(
        "calibration/surroundings.py",
        "torch.utils._python_dispatch",
        "to give each waiting sample its own dispatch modes",
    ),
    "_get_current_function_mode_stack": Use(
        "calibration/surroundings.py",
        "torch.overrides",
        "to give each waiting sample its own torch function modes",
    ),
    "_pop_mode": Use(
        "calibration/surroundings.py", "torch.overrides", "to take modes off the stack"
    ),
    "_push_mode": Use(
        "calibration/surroundings.py", "torch.overrides", "to put modes back onto the stack"
    ),
    "_python_dispatch": Use(
        "calibration/surroundings.py",
        "torch.utils",
        "to give each waiting sample its own dispatch modes",
    ),
    "_buffers": Use(
        "calibration/surroundings.py", "torch.nn:Module", "to see which buffers a forward replaces"
    ),
    "_experts_implementation_internal": Use(
        "calibration/pruning_mode.py",
        "transformers:PreTrainedConfig",
        "to run experts one after the other, since grouped products hide which token an expert gets",
    ),
    "_non_persistent_buffers_set": Use(
        "calibration/pruning_mode.py",
        "torch.nn:Module",
        "to restore only the buffers in the state dict, since the others are caches",
    ),
    "_version": Use(
        "calibration/gradients.py", "torch:Tensor", "to notice that a tensor was written in place"
    ),
    "_pytree": Use(
        "calibration/gradients.py",
        "torch.utils",
        "to find the tensors in nested arguments, also in registered classes of transformers",
    ),
    # Modules, and what replaces their forward
    "_forward_pre_hooks": Use(
        "models/inventory.py", "torch.nn:Module", "to recognize weights that a hook computes"
    ),
    "_modules": Use(
        "models/layers.py", "torch.nn:Module", "to leave out the wrappers of `torch.compile`"
    ),
    "_orig_mod": Use(
        "models/layers.py",
        "torch._dynamo.eval_frame:OptimizedModule",
        "to leave `torch.compile` out of the names of layers",
    ),
    "_parameters": Use(
        "models/expert_stacks.py", "torch.nn:Module", "to list the parameters that a module owns"
    ),
    "_reversed_padding_repeated_twice": Use(
        "models/layers.py",
        "torch.nn:Conv2d",
        "to pad the inputs of a convolution as its own forward does",
    ),
    "_is_fsdp_managed_module": Use(
        "parallel/fsdp.py",
        "torch.distributed.fsdp._fully_shard._fully_shard",
        "to recognize modules that FSDP divides, perhaps from a module around them",
    ),
    # Adapters
    "_backward_hooks": Use(
        "lora/keep_zeros_linear.py", "torch.nn:Module", "to call a base layer that has hooks"
    ),
    "_backward_pre_hooks": Use(
        "lora/keep_zeros_linear.py", "torch.nn:Module", "to call a base layer that has hooks"
    ),
    "_forward_hooks": Use(
        "lora/keep_zeros_linear.py", "torch.nn:Module", "to call a base layer that has hooks"
    ),
    "_check_target_module_exists": Use(
        "lora/tuner.py", "peft:LoraModel", "to check all targets before the first one is replaced"
    ),
    "_create_new_module": Use(
        "lora/tuner.py", "peft:LoraModel", "to put our layer in the place of a target"
    ),
    "_maybe_include_all_linear_layers": Use(
        "lora/tuner.py",
        "peft.tuners.tuners_utils",
        "to resolve `all-linear` before the targets are checked",
    ),
    "_prepare_model": Use(
        "lora/tuner.py", "peft:LoraModel", "to check all targets before the first one is replaced"
    ),
    "_member_map_": Use("lora/register.py", "enum:Enum", "to add a type of adapters to PEFT"),
    "_member_names_": Use("lora/register.py", "enum:Enum", "to add a type of adapters to PEFT"),
    "_value2member_map_": Use("lora/register.py", "enum:Enum", "to add a type of adapters to PEFT"),
    # Files and folders of models
    "_is_hf_initialized": Use(
        "streaming/checkpoint.py",
        "transformers.modeling_utils",
        "to keep transformers from initializing weights that are read later",
    ),
    "_keys_to_ignore_on_load_unexpected": Use(
        "modules/loading.py",
        "transformers:PreTrainedModel",
        "to copy the stored tensors that the model does not load",
    ),
    "_keys_to_ignore_on_save": Use(
        "streaming/checkpoint.py",
        "transformers:PreTrainedModel",
        "to write the same tensors as `save_pretrained`",
    ),
    "_load_pretrained_model": Use(
        "streaming/checkpoint.py",
        "transformers:PreTrainedModel",
        "to read only the weights outside of the blocks at first",
    ),
    "_weight_conversions": Use(
        "streaming/checkpoint.py",
        "transformers.core_model_loading",
        "to write the weights of a block under their names in the source",
    ),
    "_name_or_path": Use(
        "streaming/from_disk.py",
        "transformers.configuration_utils",
        "to compare two configurations without the place that they come from",
    ),
    "_deprecated_models": Use(
        "units/configuration.py",
        "timm.models._registry",
        "to keep `shrunk_model` out of timm's list of models",
    ),
    "_registry": Use(
        "units/configuration.py",
        "timm.models",
        "to keep `shrunk_model` out of timm's list of models",
    ),
    "_model_args": Use(
        "units/configuration.py",
        "timm.models._factory",
        "to build a shrunk model with the arguments of the dense one",
    ),
    "_model_mapping": Use(
        "units/configuration.py",
        "transformers.models.auto.auto_factory:_BaseAutoModelClass",
        "to find the Auto classes that load a class of models",
    ),
    # Others
    "_BatchNorm": Use(
        "engine/batch_norm.py", "torch.nn.modules.batchnorm", "to find all BatchNorm layers"
    ),
    "_load_config": Use(
        "cli/options.py",
        "cyclopts.config:Yaml",
        "to read `--config FILE.yaml` with numbers such as 2:4 as text",
    ),
}

ALSO_IN = {
    "_C": ["calibration/observer.py", "calibration/surroundings.py"],
    "_buffers": ["models/layers.py"],
    "_compiled_call_impl": ["callbacks/distillation.py"],
    "_forward_pre_hooks": ["lora/keep_zeros_linear.py"],
    "_functorch": ["calibration/observer.py", "calibration/surroundings.py"],
    "_model_args": ["modules/image_classifier.py"],
    "_parameters": ["models/layers.py"],
    "_pytree": ["training/reconstruct.py"],
    "_version": ["calibration/pruning_mode.py", "engine/write.py"],
}
"""Names that more files use than the one in the table: to be reduced, not extended."""

# Documented by Python, in spite of the underscore.
PUBLIC = {"_asdict", "_current_frames", "_fields", "_make", "_name_", "_replace", "_value_"}
TEXTS = {"_stderr", "_token_id"}  # ends of names


def is_private(name: str) -> bool:
    return bool(re.fullmatch(r"_[^\W_]\w*", name)) and name not in PUBLIC | TEXTS


def names_in(tree: ast.AST) -> Iterator[str]:
    """The parts of imported names, and texts that are not a part of an f-string."""
    formatted = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            formatted.update(map(id, node.values))

    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in formatted:
                yield node.value
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                yield from alias.name.split(".")
            if isinstance(node, ast.ImportFrom) and node.module:
                yield from node.module.split(".")


def attributes_in(tree: ast.AST) -> Iterator[ast.Attribute]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node


def is_of_super(attribute: ast.Attribute) -> bool:
    return isinstance(attribute.value, ast.Call) and ast.unparse(attribute.value.func) == "super"


def methods_in(tree: ast.AST) -> set[str]:
    methods = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            methods.update(inner.name for inner in node.body if isinstance(inner, ast.FunctionDef))
    return methods


def members_in(tree: ast.AST) -> set[str]:
    """The methods, annotated fields and attributes of the classes in a file."""
    members = methods_in(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            members.add(node.target.id)
    for attribute in attributes_in(tree):
        if isinstance(attribute.ctx, ast.Store) and ast.unparse(attribute.value) == "self":
            members.add(attribute.attr)
    return members


def defined_in(tree: ast.AST) -> set[str]:
    defined = members_in(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
    return defined


def foreign_names(tree: ast.AST, inherited: Set[str] = frozenset()) -> set[str]:
    """The private names that a file reads or imports, but does not define.

    `self` may also have what classes in other files define: `inherited`.
    """
    names = set(names_in(tree)) - defined_in(tree)
    members = members_in(tree)
    for attribute in attributes_in(tree):
        known = members
        if is_of_super(attribute):
            known = set()
        elif ast.unparse(attribute.value) == "self":
            known = members | inherited
        if attribute.attr not in known:
            names.add(attribute.attr)
    return {name for name in names if is_private(name)}


def used_in(folder: Path) -> dict[str, list[str]]:
    """The files that use each private name of another library."""
    trees = {}
    for file in sorted(folder.rglob("*.py")):
        trees[file.relative_to(folder).as_posix()] = ast.parse(file.read_text(encoding="utf-8"))
    members = set()
    called = set()
    for tree in trees.values():
        members |= members_in(tree)
        called |= methods_in(tree) & {attribute.attr for attribute in attributes_in(tree)}

    files: dict[str, list[str]] = {}
    for file, tree in trees.items():
        # Nothing in the package calls it, so a library does: it replaces a method there.
        replaced = {name for name in methods_in(tree) - called if is_private(name)}
        for name in sorted(foreign_names(tree, members) | replaced):
            files.setdefault(name, []).append(file)
    return files


def test_the_table_has_every_name_with_its_file():
    expected = {name: {use.file, *ALSO_IN.get(name, ())} for name, use in USES.items()}
    used = {name: set(files) for name, files in used_in(PACKAGE).items()}
    wrong = []
    for name in sorted(expected.keys() | used.keys()):
        has = sorted(expected.get(name, ()))
        if set(has) != used.get(name, set()):
            wrong.append(f"{name} is used in {sorted(used.get(name, ()))}, the table has {has}")
    assert not wrong, "Find a public way, or change the table:\n" + "\n".join(wrong)


@pytest.mark.parametrize("name", USES)
def test_the_library_has_the_name(name):
    use = USES[name]
    owner = pkgutil.resolve_name(use.owner)
    # An attribute of instances is only in the text of the class.
    exists = hasattr(owner, name) or re.search(rf"\b{name}\b", inspect.getsource(owner))
    assert exists, f"{use.owner} has no {name}, which {use.file} needs {use.purpose}."


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("model._hooks", {"_hooks"}),
        ("super()._run()\ndef _run(self): ...", {"_run"}),
        ("getattr(model, '_args', None)", {"_args"}),
        ("from a._b.c import _d", {"_b", "_d"}),
        ("class A:\n    def _own(self): return other._own", set()),
        ("def _version(x): return x._version", {"_version"}),
        ("self._own = 1\nself._own", set()),
        ("f'{a}_loss', x._replace(a=1), x.__dict__, _", set()),
    ],
)
def test_the_scan_finds_names_of_others(source, names):
    assert foreign_names(ast.parse(source)) == names


def test_a_method_that_nothing_calls_is_called_by_a_library(tmp_path):
    (tmp_path / "a.py").write_text("class A:\n    def _hook(self): ...\n    def _own(self): ...")
    (tmp_path / "b.py").write_text("class B(A):\n    def _own(self): self._own()")
    assert used_in(tmp_path) == {"_hook": ["a.py"]}
