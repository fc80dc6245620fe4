"""Load the model that a command names, and the data to calibrate and measure it."""

from typing import Any

from wanda_lightning.cli.options import Data, Measurements, Model, Models
from wanda_lightning.common.errors import UserError
from wanda_lightning.common.model_source import load_config, load_tokenizer
from wanda_lightning.data.images import ImageDataModule
from wanda_lightning.data.sentence_pairs import STSB
from wanda_lightning.data.sentences import SentenceDataModule
from wanda_lightning.data.text import TextDataModule
from wanda_lightning.lightning_modules import CausalLMModule, EmbeddingModule, ImageClassifierModule

_PAPER_SEQLEN = 2048

AnyData = TextDataModule | SentenceDataModule | ImageDataModule


def load(options: Model | Models, name: str, checkpoint: str | None = None) -> Any:
    """Return the module of a model, an image classifier with its pretrained weights or those of a checkpoint."""
    if options.is_image:
        return ImageClassifierModule(name, pretrained=checkpoint is None, checkpoint=checkpoint)
    if options.is_embedding:
        return EmbeddingModule(name, **options.source(name).hub)
    return CausalLMModule(name, dtype=options.dtype, **options.source(name).hub)


def data_for(
    options: Model | Models, data: Data | Measurements, name: str, classifier: Any = None
) -> AnyData:
    """Return the images for a classifier, or the texts for a model of this name; windows fit all models."""
    # `evaluate` calibrates nothing, so it has neither of these two options.
    num_samples = getattr(data, "num_samples", None)
    seed = getattr(data, "seed", 0)
    if options.is_image:
        images = ImageDataModule(
            data.data or "", classifier, data.batch_size or 64, num_samples or 4096, seed=seed
        )
        images.setup()
        return images
    calibration = ",".join(getattr(data, "calibration", ("python-docs",)))
    if options.is_embedding:
        sentences = SentenceDataModule(
            calibration=calibration,
            evaluation=_pairs(data),
            batch_size=data.batch_size or 32,
            num_samples=num_samples or 1024,
            limit=data.limit,
            seed=seed,
            cache_dir=options.cache_dir,
        )
        if data.evaluation:
            sentences.setup()
        return sentences
    return TextDataModule(
        load_tokenizer(options.source(name)),
        calibration=calibration,
        evaluation=data.evaluation or "python-docs",  # which is not read
        seqlen=window_length(options, data.seqlen),
        num_samples=num_samples or 128,
        batch_size=data.batch_size or 4,
        limit=data.limit,
        seed=seed,
        cache_dir=options.cache_dir,
        packing=getattr(data, "packing", "windows"),
    )


def _pairs(data: Data | Measurements) -> str:
    """Return the pairs of sentences to measure on: STS-B in place of the default, which is a text."""
    # The same object if the option was not given: a text that was asked for is refused.
    if not data.evaluation or data.evaluation is Data.evaluation:
        return STSB
    if len(data.evaluation) > 1:
        raise UserError("--evaluation must be one file of pairs, or stsb, for an embedding model.")
    return data.evaluation[0]


def window_length(options: Model | Models, asked: int | None) -> int:
    """Return the number of tokens in a window: `asked` if it fits all models, else what fits them, at most 2048."""
    length = asked or _PAPER_SEQLEN
    for name in options.all:
        config = load_config(options.source(name)).get_text_config()
        # 0 or missing: the model has no largest position, so any window fits.
        context = getattr(config, "max_position_embeddings", 0) or length
        if asked and asked > context:
            raise UserError(
                f"--seqlen must be at most {context}, the model's context, but it is {asked}."
            )
        length = min(length, context)
    return length
