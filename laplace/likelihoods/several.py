"""Several heads at once: outputs side by side, each with a likelihood of its own, independent given the outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from laplace.enums import LinkApprox, PredType
from laplace.errors import ShapeError, UnsupportedError
from laplace.likelihoods.base import AbstractLikelihood, Ask, Link, Positions
from laplace.likelihoods.output_hessian import OutputHessian
from laplace.likelihoods.roots import SideBySide
from laplace.types import Outputs, Scalar, Targets


@dataclass(frozen=True)
class Part:
    """One head among several: its likelihood, and where its outputs and targets are."""

    key: str | int
    likelihood: AbstractLikelihood
    outputs: slice
    """Among all outputs."""
    targets: slice
    """Among the columns of packed targets."""
    integer: bool
    """Whether its targets are whole numbers."""
    shape: tuple[int, ...]
    """Of the targets of a row."""

    def split(self, f: Outputs, y: Targets) -> Positions:
        """Outputs and targets of the head, checked."""
        own = y[:, self.targets].reshape(len(y), *self.shape)
        return self.likelihood.flatten(f[:, self.outputs], own.long() if self.integer else own.to(f.dtype))


def columns(y: Tensor) -> Float[Tensor, "batch columns"]:
    """Targets ``[batch, ...]`` of one head as numbers that go beside those of others."""
    return y.reshape(len(y), -1).double()


@dataclass(frozen=True)
class SeveralLikelihood(AbstractLikelihood):
    """−log p(y|f) = Σ_k −log p_k(y_k|f_k), each part at its own noise, tempered by 1/T.

    Attributes
    ----------
    parts
        The heads, in the order of their outputs.
    temperature
        T.
    """

    parts: tuple[Part, ...] = ()
    temperature: float | Tensor = 1.0

    name: ClassVar[str] = "several"

    # -- fitting ------------------------------------------------------------------------------------------------------

    def _split(self, f: Outputs, y: Targets) -> list[tuple[AbstractLikelihood, Positions]]:
        return [(part.likelihood, part.split(f, y)) for part in self.parts]

    def nll(self, f: Outputs, y: Targets) -> Scalar:
        """The sum over heads."""
        return torch.stack([one.scaled_nll(rows.f, rows.y) for one, rows in self._split(f, y)]).sum()

    def gradient(self, f: Outputs, y: Targets) -> Outputs:
        """Those of the heads, side by side."""
        split = zip(self.parts, self._split(f, y), strict=True)
        return torch.cat([_scale(part, f) * one.gradient(rows.f, rows.y) for part, (one, rows) in split], -1)

    def observed(self, f: Outputs, y: Targets) -> Outputs:
        """Those of the heads, side by side."""
        return torch.cat([one.observed(rows.f, rows.y) for one, rows in self._split(f, y)], -1)

    def hessian(self, f: Outputs) -> OutputHessian:
        """Those of the heads, in blocks: what a head has of a root is zero for the others."""
        found = [(part.outputs, _scale(part, f), part.likelihood.hessian(f[:, part.outputs])) for part in self.parts]
        rooted = [(at, scale, own) for at, scale, own in found if own.root is not None]
        signs = {own.sign for _, _, own in rooted}
        if len(signs) > 1:
            msg = f"Heads whose likelihoods are {self._named} cannot be put together for all weights: fit last layers."
            raise UnsupportedError(msg)
        diagonal, total = torch.zeros_like(f), torch.zeros_like(f)
        roots = []
        for at, scale, own in found:
            total[:, at] = scale * own.diag()
            if own.diagonal is not None:
                diagonal[:, at] = scale * own.diagonal
        for at, scale, own in rooted:
            assert own.root is not None
            wide = f.new_zeros(*f.shape, own.root.shape[-1])
            wide[:, at] = scale.sqrt().reshape(-1, 1) * own.root
            roots.append(wide)
        root = torch.cat(roots, -1) if roots else None
        return OutputHessian(f.shape[-1], diagonal, root, signs.pop() if signs else 1, total)

    def hessian_root(self, f: Outputs) -> Float[Tensor, "rows outputs columns"]:
        """Those of the heads, in blocks."""
        wide = []
        for part in self.parts:
            root = part.likelihood.hessian_root(f[:, part.outputs])
            block = f.new_zeros(*f.shape, root.shape[-1])
            block[:, part.outputs] = _scale(part, f).sqrt().reshape(-1, 1) * root
            wide.append(block)
        return torch.cat(wide, -1)

    def lazy_root(self, f: Outputs) -> SideBySide:
        """Those of the heads, side by side."""
        return SideBySide([(part.likelihood.lazy_root(f[:, part.outputs]), _scale(part, f)) for part in self.parts])

    def sample_gradient(self, f: Outputs, n_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Those of the heads, side by side, ``[samples, rows, C]``."""
        return torch.cat(
            [
                _scale(part, f).sqrt() * part.likelihood.sample_gradient(f[:, part.outputs], n_samples, generator)
                for part in self.parts
            ],
            -1,
        )

    def expectation(self, f: Tensor) -> Tensor:
        """E[y | f] of the heads, side by side."""
        return torch.cat([part.likelihood.expectation(f[..., part.outputs]) for part in self.parts], -1)

    def log_normalizer(self, n_positions: int, n_outputs: int) -> Scalar:  # noqa: ARG002
        """The sum over heads."""
        widths = [(part.likelihood, part.outputs.stop - part.outputs.start) for part in self.parts]
        return torch.stack([one.log_normalizer(n_positions, width).double() for one, width in widths]).sum()

    # -- predicting: what tuning scores; heads are predicted by themselves ---------------------------------------------

    @classmethod
    def _problem_with(cls, kind: PredType, link: LinkApprox, *, joint: bool, diagonal_output: bool) -> str:  # noqa: ARG003
        return "" if kind is PredType.GLM else 'Several heads are tuned with pred_type="glm".'

    def asks(self, kind: PredType, link: LinkApprox, *, joint: bool, diagonal_output: bool) -> Ask:  # noqa: ARG002
        """Covariances serve every head."""
        return Ask.COVARIANCE

    def link(self, name: LinkApprox, n_samples: int, generator: torch.Generator | None) -> Link:
        """The links of the heads, side by side."""
        links = [(part.outputs, part.likelihood.link(name, n_samples, generator)) for part in self.parts]
        return lambda mean, cov: [link(mean[:, at], cov[:, at, at]) for at, link in links]

    def average(
        self,
        functions: Iterable[Float[Tensor, "samples rows outputs"]],  # noqa: ARG002
        n_samples: int,  # noqa: ARG002
        center: Outputs,  # noqa: ARG002
    ) -> NoReturn:
        """Not of all heads at once."""
        return self._refuse("average of functions")

    def predict(self, mean: Tensor, cov: Tensor, link: Link) -> NoReturn:  # noqa: ARG002
        """Not of all heads at once: each has a prediction of its own kind."""
        return self._refuse("prediction of all heads in one tensor")

    def predictive_nll(self, mean: Outputs, cov: Tensor, y: Targets, link: Link) -> Scalar:  # noqa: ARG002
        """The sum over heads, by their probit links or closed forms."""
        total = []
        for part, (one, rows) in zip(self.parts, self._split(mean, y), strict=True):
            own = one.link(LinkApprox.PROBIT, 1, None)
            total.append(one.predictive_nll(rows.f, cov[:, part.outputs, part.outputs], rows.y, own))
        return torch.stack(total).sum()

    def scores(self) -> Mapping[str, Callable[..., Tensor] | None]:
        """The log density."""
        return {"nll": self.predictive_nll}

    # -- data ---------------------------------------------------------------------------------------------------------

    def flatten(self, f: Tensor, y: Tensor) -> Positions:
        """Check the targets of every head, packed into columns."""
        if f.dim() != 2:
            msg = f"Several heads with all weights take outputs [batch, C]; they are {list(f.shape)}. Fit last layers."
            raise ShapeError(msg)
        for one, rows in self._split(f, y):
            if rows.kept is not None and len(rows.kept) < len(f):
                msg = (
                    f"A head with likelihood={one.name!r} has masked targets. With all weights each row needs a target "
                    "for every head; last layers are fitted one by one, and take rows that others miss."
                )
                raise UnsupportedError(msg)
        return Positions(f, y)

    def count(self, y: Tensor, n_outputs: int) -> int:  # noqa: ARG002
        """Number of rows."""
        return len(y)

    @property
    def described(self) -> str:
        """The parts, as states know them."""
        return f"{self.name}({self._named})"

    @property
    def _named(self) -> str:
        """With noise and temperatures, which are part of the curvature."""
        return ", ".join(
            f"{part.key!r}: {part.likelihood.described} at the scale {_scale(part, torch.ones(())).tolist()}"
            for part in self.parts
        )


def _scale(part: Part, like: Tensor) -> Tensor:
    """Factor of the loss of a head."""
    return torch.as_tensor(part.likelihood.scale).to(like)


__all__ = ["Part", "SeveralLikelihood", "columns"]
