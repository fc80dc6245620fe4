"""`wanda-lightning prune`: the reference's flags, on any model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import lightning as L
from rich.console import Console
from rich.table import Table

from wanda_lightning.callbacks import PruningCallback
from wanda_lightning.cli.measure import measure
from wanda_lightning.cli.options import TIMM, as_pattern, as_patterns, checked_seqlen, refuse_given
from wanda_lightning.data import ImageDataModule, TextDataModule
from wanda_lightning.evaluation import Evaluation, load_tasks, task_names, zero_shot
from wanda_lightning.files import refuse_nonempty, refuse_replacement, whole_file
from wanda_lightning.methods import METHODS, PRESETS
from wanda_lightning.modules import CausalLMModule, ImageClassifierModule
from wanda_lightning.plan import make_plan
from wanda_lightning.report import PruningReport

_PAPER_SEQLEN = 2048
_PAPER_IMAGES, _PAPER_SEQUENCES = 4096, 128


MethodName = Literal[
    "magnitude",
    "wanda",
    "ria",
    "sparsegpt",
    "ablate_mag_seq",
    "ablate_wanda_seq",
    "ablate_mag_iter",
    "ablate_wanda_iter",
    "refit",
    "admm",
    "reconstruct",
]


def prune_model(
    model: str,
    seed: int = 0,
    nsamples: int | None = None,
    sparsity_ratio: float = 0.5,
    sparsity_type: str = "unstructured",
    prune_method: MethodName | None = None,
    preset: Literal["fast", "balanced", "best"] | None = None,
    cache_dir: str | None = None,
    use_variant: bool = False,
    save: str | None = None,
    save_model: str | None = None,
    seqlen: int | None = None,
    calibration: str | None = None,
    eval: str | None = None,
    limit: int | None = None,
    sequential: Literal["block", "layer", "none"] | None = None,
    allocation: Literal["uniform", "owl", "owl_layer", "alpha", "alpha_layer", "fisher"] | None = None,
    dtype: str | None = None,
    batch_size: int | None = None,
    skip: str | list[str] = "",
    only: str | list[str] = "",
    include_grouped: bool = False,
    data_path: str | None = None,
    prune_granularity: Literal["row", "layer"] | None = None,
    min_expert_tokens: int = 32,
    resume: str | None = None,
    eval_zero_shot: bool = False,
    tasks_dir: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Prune a language model or an image classifier, and measure it before and after.

    Args:
        model: Hub id, folder or .gguf file of a language model; or timm:NAME of an image classifier.
        seed: Draws the calibration samples.
        nsamples: Calibration samples; by default 128 sequences or 4096 images, as in the paper.
        sparsity_ratio: Fraction of each pruned layer's weights that become zero.
        sparsity_type: unstructured, or any N:M such as 2:4 and 4:8.
        prune_method: wanda (the default), magnitude, ria, sparsegpt, refit, admm, reconstruct, or one of
            the reference's ablations.
        preset: Instead of a method: fast (Wanda, one pass), balanced (better at every sparsity), or best.
        cache_dir: Where downloads from the hub are kept.
        use_variant: Let rows differ in sparsity: each loses the same share of its score (the paper's variant).
        save: Folder for log_METHOD.txt and pruning_report.json.
        save_model: Folder for the pruned model.
        seqlen: Tokens in a window; by default the model's context, 2048 at the most.
        calibration: c4 (as in the paper, the default), wikitext2, python-docs (needs no network) or a FILE (.txt,
            .jsonl, .parquet).
        eval: Text to measure perplexity on, likewise; by default wikitext2.
        limit: Windows of it; by default all.
        sequential: What the statistics see; by default block for language models, model for image classifiers.
        allocation: How the sparsity is spread: the same for all layers (uniform, the default); less where more scores
            are outliers (owl) or where the weights' spectrum has a heavier tail (alpha), per block or per layer; less
            where the predictions depend on more (fisher).
        dtype: auto (as stored, the default), float32, bfloat16 or float16.
        batch_size: Samples in a batch; by default 4 sequences or 64 images.
        skip: Layers to leave dense: names, globs or re: expressions, separated by commas or as a list.
        only: The layers to prune, likewise, where not all.
        include_grouped: Prune grouped convolutions, too, each group as a matrix of its own.
        data_path: Images to calibrate and measure on: a folder in the manner of ImageNet, cifar10, cifar100, a hub id,
            or digits (needs no network).
        prune_granularity: Compare weights within a row or a layer; by default a row, for magnitude a layer.
        min_expert_tokens: Experts to which fewer calibration tokens were routed are pruned by what all experts of
            their module saw.
        resume: Weights (.safetensors) of the image classifier.
        eval_zero_shot: Measure the pruned model on the paper's seven zero-shot tasks, too (needs lm-eval).
        tasks_dir: Folder with a TASK.jsonl for each of them; by default they come from the hub.
        overwrite: Add to a --save folder that is not empty; replace a --save_model folder
            with all that is in it.
        trust_remote_code: Run the code that comes with a hub model.

    Raises:
        ValueError: If the options do not fit together or the model; before anything is written.
    """
    options = dict(locals())
    if save is not None:
        refuse_nonempty(save, overwrite)
    if save_model is not None:
        refuse_replacement(save_model, overwrite)
    is_image = model.startswith(TIMM)
    if is_image:
        refuse_given(
            "an image classifier",
            seqlen=seqlen,
            limit=limit,
            calibration=calibration,
            eval=eval,
            dtype=dtype,
            trust_remote_code=trust_remote_code or None,
            eval_zero_shot=eval_zero_shot or None,
            tasks_dir=tasks_dir,
        )
    else:
        refuse_given("a language model", data_path=data_path, resume=resume)
    if not eval_zero_shot:
        refuse_given("pruning without --eval_zero_shot", tasks_dir=tasks_dir)
    if preset is not None:
        refuse_given("a preset, which chooses the method", prune_method=prune_method)
    name = preset or prune_method or "wanda"
    if preset is None:
        options["prune_method"] = name
    usual = {**METHODS, **PRESETS}[name].sequential or ("none" if is_image else "block")
    callback = PruningCallback(
        sparsity_ratio,
        method=name,
        pattern=_pattern(sparsity_type, name, prune_granularity, use_variant),
        allocation=allocation,
        sequential=sequential or usual,
        skip=as_patterns(skip),
        only=as_patterns(only),
        include_grouped=include_grouped,
        num_samples=_or(nsamples, _PAPER_IMAGES if is_image else _PAPER_SEQUENCES),
        min_expert_tokens=min_expert_tokens,
    )
    tasks = load_tasks(task_names(["paper"]), tasks_dir, cache_dir) if eval_zero_shot else {}
    L.seed_everything(seed, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    module: CausalLMModule | ImageClassifierModule
    data: TextDataModule | ImageDataModule
    if is_image:
        module = ImageClassifierModule(model, pretrained=resume is None, checkpoint=resume)
        data = ImageDataModule(
            data_path or "digits",
            module,
            batch_size=_or(batch_size, 64),
            num_samples=callback.num_samples,
            seed=seed,
            cache_dir=cache_dir,
        )
        metric, heading = "val_accuracy", "top-1"
    else:
        module = CausalLMModule(model, dtype=dtype or "auto", cache_dir=cache_dir, trust_remote_code=trust_remote_code)
        data = TextDataModule(
            module.tokenizer,
            calibration or "c4",
            eval or "wikitext2",
            seqlen=checked_seqlen(seqlen, module, _PAPER_SEQLEN),
            num_samples=callback.num_samples,
            batch_size=_or(batch_size, 4),
            limit=limit,
            seed=seed,
            cache_dir=cache_dir,
        )
        metric, heading = "val_perplexity", "perplexity"
    make_plan(callback.config, module.model)  # refuses now what would be refused after the dense model was measured
    if callback.config.data_reader is not None and isinstance(data, TextDataModule):
        _ = data.calibration_windows
    dense = measure(module, data, metric)
    pruned = measure(module, data, metric, callback)
    report = callback.report
    assert report is not None
    options |= _as_used(data)
    report.config["command"] = {name: value for name, value in options.items() if value is not None}
    report.config["measured"] = {"metric": metric, "dense": dense, "pruned": pruned}
    if save_model is not None:
        module.save_pretrained(save_model, overwrite=overwrite)
    if tasks:  # hours for a large model, which is safe by now
        accuracies = zero_shot(module.model, module.tokenizer, tasks, data.batch_size)
        report.config["measured"]["zero_shot"] = accuracies
    if save is not None:
        _write_results(Path(save), name, "top1_test" if is_image else "ppl_test", pruned, report)
    _print_results(name, heading, dense, pruned, report)
    if tasks:
        Console().print(Evaluation({f"{model}, pruned": accuracies}).table())


def _pattern(sparsity_type: str, method: str, group: Literal["row", "layer"] | None, use_variant: bool) -> str:
    if sparsity_type != "unstructured":
        if use_variant or group:
            option = "--use_variant" if use_variant else "--prune_granularity"
            raise ValueError(f"{option} is for --sparsity_type unstructured, but {sparsity_type} was given")
        return as_pattern(sparsity_type)
    if use_variant:
        if method != "wanda" or group == "layer":
            raise ValueError("--use_variant is a way to compare Wanda's scores within rows: use --prune_method wanda")
        return "equal_share"
    return f"unstructured_{group}" if group else "unstructured"


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _as_used(data: TextDataModule | ImageDataModule) -> dict[str, Any]:
    """The options that have no fixed default, as they turned out."""
    used: dict[str, Any] = {"nsamples": data.num_samples, "batch_size": data.batch_size}
    if isinstance(data, ImageDataModule):
        return {**used, "data_path": data.data}
    return {**used, "seqlen": data.seqlen, "calibration": data.calibration, "eval": data.evaluation}


def _write_results(folder: Path, method: str, column: str, measured: float, report: PruningReport) -> None:
    report.save(folder)
    with whole_file(folder / f"log_{method}.txt") as temporary:
        temporary.write_text(
            f"method\tactual_sparsity\t{column}\n{method}\t{report.sparsity:.4f}\t{measured:.4f}\n", encoding="utf-8"
        )


def _print_results(method: str, heading: str, dense: float, pruned: float, report: PruningReport) -> None:
    table = Table()
    for column in ("method", "sparsity", "of the model", f"dense {heading}", f"pruned {heading}", "seconds to prune"):
        table.add_column(column, justify="left" if column == "method" else "right")
    numbers: list[Any] = [f"{report.sparsity:.2%}", f"{report.model_sparsity:.2%}"]
    numbers += [f"{value:.2%}" if heading == "top-1" else f"{value:.2f}" for value in (dense, pruned)]
    table.add_row(method, *numbers, f"{report.seconds['prune']:.1f}")
    console = Console(emoji=False)  # `N:M:` would hold one
    console.print(table)
    for note in report.notes:
        console.print(f"Note: {note}", markup=False)
