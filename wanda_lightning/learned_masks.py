"""Learn which weights are zero while a model trains, in any training loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from wanda_lightning.core.bits import pack, unpack
from wanda_lightning.core.hyperparameters import Number, check
from wanda_lightning.core.masking import masked
from wanda_lightning.core.relaxation import Relaxation
from wanda_lightning.models import Layer

_DECAY = 0.95  # of both running means; bfloat16 would round smaller changes of a mean away
_SMALLEST = 1e-18
_STORED = ("values", "scores", "mean", "square")


@dataclass(frozen=True)
class MaskLearning:
    """The hyperparameters of `LearnMasks`.

    Attributes:
        travel: How far a score moves in the whole training if its slope always has the same sign.
        prior: Score that a weight of the start mask has in advance, above 1.
        temperature: Temperature of the relaxation at the first and last step; it falls geometrically.
        noise: Factor of the noise at the first and last step; it changes linearly.
        straight_through: Train with exact masks, and use the relaxation only for gradients.
        train_weights: Also train the weights; if false, all parameters of the module stay fixed.
        seed: Seed of the noise.
    """

    travel: float = 2.0
    prior: float = 2.0
    temperature: tuple[float, float] = (1.0, 0.1)
    noise: tuple[float, float] = (0.0, 0.0)
    straight_through: bool = True
    train_weights: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check(self, travel=Number(above=0, maximum=1000), prior=Number(above=1, maximum=100))
        check(self, seed=Number(minimum=0, maximum=2**31 - 1, whole=True))
        for name, rule in (("temperature", Number(above=0)), ("noise", Number(minimum=0))):
            values = getattr(self, name)
            if not isinstance(values, tuple | list) or len(values) != 2 or not all(map(rule.accepts, values)):
                raise ValueError(
                    f"{name} must be two values, for the first and the last step, each {rule}, but it is {values!r}."
                )

    def temperature_at(self, progress: float) -> float:
        """Return the temperature after a fraction of the steps."""
        first, last = self.temperature
        return first * (last / first) ** progress

    def noise_at(self, progress: float) -> float:
        """Return the factor of the noise after a fraction of the steps."""
        first, last = self.noise
        return first + (last - first) * progress


@dataclass
class LearnedLayer:
    """The state of one layer. All tensors but `start` are matrices (d_out, d_in).

    Attributes:
        layer: The layer.
        values: The weights without the mask, in the dtype of the weight.
        scores: float32. Larger scores survive.
        mean: bfloat16; the running mean of the slopes of the loss with respect to the scores.
        square: bfloat16; the running mean of their squares.
        keep: The exact mask, boolean.
        start: The mask at the start, as `core.bits.pack` stores it.
    """

    layer: Layer
    values: Tensor
    scores: Tensor
    mean: Tensor
    square: Tensor
    keep: Tensor
    start: Tensor

    @classmethod
    def begin(cls, layer: Layer, keep: Tensor, dense: Tensor, prior: float) -> LearnedLayer:
        """Start from the mask of a pruned layer, and from the dense values of its zeros.

        Scores are `prior` for the kept weights plus, for all weights, the hyperbolic tangent of the magnitude relative
        to the root mean square of the kept ones, which orders weights within the kept and the dropped ones.
        """
        values = torch.where(keep, layer.read(), dense)
        kept = values.float().masked_fill(~keep, 0)
        scale = (kept.square().sum() / keep.sum().clamp(min=1)).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        scores = (values.float().abs() / scale).tanh_().add_(keep, alpha=prior)
        mean = torch.zeros_like(scores, dtype=torch.bfloat16)
        return cls(layer, values, scores, mean, mean.clone(), keep.clone(), pack(keep))

    @classmethod
    def resume(cls, layer: Layer, state: Mapping[str, Tensor]) -> LearnedLayer:
        """Restore a layer from `state_dict`."""
        stored = {name: state[name].to(layer.weight.device) for name in _STORED}
        keep = torch.empty_like(stored["values"], dtype=torch.bool)
        return cls(layer, **stored, keep=keep, start=state["start"])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors without the mask, which the scores define."""
        return {name: getattr(self, name) for name in (*_STORED, "start")}

    def gradient(self) -> Tensor | None:
        """Return the gradient of the weight; None if there is none."""
        gradient = self.layer.parameter.grad
        return None if gradient is None else self.layer.kind.read(self.layer.part(gradient))

    def mask_gradient(self, mask: Tensor) -> None:
        """Multiply the gradient of the weight by an exact mask (boolean) or a relaxed one."""
        gradient = self.gradient()
        assert gradient is not None
        product = masked(gradient, mask) if mask.dtype == torch.bool else gradient * mask
        whole = self.layer.parameter.grad
        assert whole is not None
        self.layer.kind.write(self.layer.part(whole), product)  # `gradient` is a copy for convolutions

    def write(self, mask: Tensor) -> None:
        """Write the values with an exact mask (boolean) or a relaxed one into the model."""
        self.layer.write(masked(self.values, mask) if mask.dtype == torch.bool else self.values * mask)

    def first_keep(self) -> Tensor:
        """Return the mask at the start, boolean."""
        return unpack(self.start, self.keep.shape).to(self.keep.device)

    def descend(self, slope: Tensor, rate: float) -> None:
        """Change the scores against the slope of the loss, by at most `rate`.

        This is Adam (Kingma & Ba 2015) with equal decays, so that the mean divided by the root of the squares is
        between -1 and 1. It is near 0 where slopes are noise.
        """
        mean = self.mean.float().lerp_(slope, 1 - _DECAY)
        square = self.square.float().lerp_(slope.square_(), 1 - _DECAY)
        self.mean.copy_(mean)
        self.square.copy_(square)
        step = mean.div_(square.sqrt_().clamp_(min=_SMALLEST)).clamp_(-1, 1)
        self.scores.sub_(step, alpha=rate)


class LearnedMasks:
    """Learn the masks of some layers by gradient descent on scores, one for each weight.

    After `settle` the weights hold the exact masks, which the present scores define. `apply` may write other masks
    before the forward pass: samples, or relaxed ones. The gradient `g` of a masked weight `v * m` gives the slopes of
    both factors: `g * v` for the mask `m`, and from there through the relaxation for the score, and `g * m` for the
    value `v`. So the model needs no other forward pass, and every layer and wrapper works.

    A score changes by the mean of its slopes divided by the root of their mean square, so that it moves where slopes
    agree, whatever their size.

    Args:
        choices: How masks are learned.
        groups: Layers that share a number of zeros, with their relaxation.
    """

    def __init__(self, choices: MaskLearning, groups: Sequence[tuple[Relaxation, Sequence[LearnedLayer]]]) -> None:
        self.choices, self._groups = choices, groups
        self._choose()  # groups of N:M in which a kept weight is zero by chance get their N again

    @property
    def layers(self) -> list[LearnedLayer]:
        """All layers."""
        return [layer for _, layers in self._groups for layer in layers]

    @torch.no_grad()
    def apply(self, step: int, progress: float) -> None:
        """Write values with the masks of this step into the model.

        Args:
            step: Number of the optimizer step, which seeds the noise.
            progress: Fraction of the steps that are done.
        """
        if self.choices.straight_through and not self.choices.noise_at(progress):
            return  # the weights hold the exact masks
        for relaxation, layers, scores in self._perturbed(step, progress):
            exact, boundary = self._exact(relaxation, layers, scores, progress), relaxation.boundary(scores)
            for index, layer in enumerate(layers):
                relax = partial(relaxation.relax, scores[index], boundary, self.choices.temperature_at(progress))
                layer.write(relax() if exact is None else exact[index])

    @torch.no_grad()
    def learn(self, step: int, progress: float, steps: float) -> None:
        """Update the scores by the gradients of the weights, and prepare the weights for the step of the optimizer.

        After this call and until `settle`, the weights hold the values without masks and their gradients. If the
        weights are not trained, the gradients are gone. Scores do not change if a gradient is NaN or infinite, as with
        a loss scale that is too large.

        Args:
            step: Number of the optimizer step, the same as for `apply`.
            progress: Fraction of the steps that are done, the same as for `apply`.
            steps: Number of all steps.
        """
        gradients = (layer.gradient() for layer in self.layers)
        is_finite = all(bool(g.sum(dtype=torch.float32).isfinite()) for g in gradients if g is not None)
        rate = 2 * self.choices.travel / max(2, steps) * (1 - progress)  # the sum over all steps is `travel`
        temperature = self.choices.temperature_at(progress)
        for relaxation, layers, scores in self._perturbed(step, progress):
            exact, boundary = self._exact(relaxation, layers, scores, progress), relaxation.boundary(scores)
            for index, layer in enumerate(layers):
                gradient = layer.gradient()
                if gradient is None:
                    continue
                with torch.enable_grad():
                    relaxed = relaxation.relax(scores[index].requires_grad_(), boundary, temperature)
                if is_finite:
                    (slope,) = torch.autograd.grad(relaxed, scores[index], gradient.float() * layer.values.float())
                    layer.descend(slope, rate)
                layer.mask_gradient(relaxed.detach() if exact is None else exact[index])
        for layer in self.layers:
            if self.choices.train_weights:
                layer.layer.write(layer.values)
            else:
                layer.layer.parameter.grad = None

    @torch.no_grad()
    def settle(self) -> None:
        """Read the values that the optimizer has written, and write them with the exact masks of the new scores."""
        for layer in self.layers if self.choices.train_weights else ():
            layer.values.copy_(layer.layer.read())
        self._choose()
        self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Write the values with the exact masks into the model."""
        for layer in self.layers:
            layer.write(layer.keep)

    def moved(self) -> dict[str, float]:
        """Return for each layer the fraction of the weights of its start mask that are no longer kept."""
        masks = ((layer.layer.name, layer.first_keep(), layer.keep) for layer in self.layers)
        return {name: float((keep & ~now).sum() / keep.sum()) for name, keep, now in masks}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return the state of each layer by its name."""
        return {layer.layer.name: layer.state_dict() for layer in self.layers}

    def _choose(self) -> None:
        """Choose the exact masks by the scores."""
        for relaxation, layers in self._groups:
            masks = relaxation.keep([layer.scores for layer in layers])
            for layer, keep in zip(layers, masks, strict=True):
                layer.keep.copy_(keep)

    def _perturbed(
        self, step: int, progress: float
    ) -> Iterator[tuple[Relaxation, Sequence[LearnedLayer], list[Tensor]]]:
        """Yield each group with the scores of its layers plus noise, in float32."""
        factor = self.choices.noise_at(progress)
        generators: dict[torch.device, torch.Generator] = {}
        for relaxation, layers in self._groups:
            perturbed = [layer.scores.clone() for layer in layers]
            for scores in perturbed if factor else ():
                if scores.device not in generators:
                    seed = self.choices.seed * 2**32 + step
                    generators[scores.device] = torch.Generator(scores.device).manual_seed(seed)
                scores.add_(relaxation.noise(scores, generators[scores.device]), alpha=factor)
            yield relaxation, layers, perturbed

    def _exact(
        self, relaxation: Relaxation, layers: Sequence[LearnedLayer], scores: Sequence[Tensor], progress: float
    ) -> Sequence[Tensor] | None:
        """Return the exact masks of some scores; None if relaxed masks are trained with."""
        if not self.choices.straight_through:
            return None
        return relaxation.keep(scores) if self.choices.noise_at(progress) else [layer.keep for layer in layers]
