"""The protocol `Source`, and how to write your own.

A source is a model that is read one matrix at a time, which is all Bitknap needs before it runs a
model. `Checkpoint` is the source of a folder with safetensors; yours may hold tensors in
memory, or decode a container that Bitknap does not read.

    class InMemory:
        config: Mapping[str, Any]               # as config.json has it
        tensors: Mapping[str, Tensor]

        @property
        def shapes(self):
            return {name: ("F32", tuple(x.shape)) for name, x in self.tensors.items()}

        def read(self, name):
            return self.tensors[name]

        def read_matrix(self, view):
            return view.of(self.tensors[view.tensor])

* `walk_headers(source.config, source.shapes, ())` finds the experts by the shapes and the names of
  the tensors. Dtypes are named as safetensors names them: "F32", "BF16", "F8_E4M3".
* `read_matrix` gets a `View`: which tensor, and which part of it. Read no more than that part if
  you can: a model may be larger than memory.
* `fingerprint` tells this model from another of the same shapes; plans and tables carry it.

`of_weights(source)` makes evidence of it for estimators that read weights alone. Calibration on a
text and `quantize` need the folder of a transformers model: write one, or convert yours first.
`examples/own_source.py` is a whole source that runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from bitknap.quantization.models.matrix_views import View


class Source(Protocol):
    """Anything that says what tensors a model has, and reads them."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The parsed `config.json`."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Tensor name to (safetensors dtype, shape)."""
        ...

    @property
    def fingerprint(self) -> str:
        """32 hex digits that tell this model from another, even one of the same shapes."""
        ...

    def read(self, name: str) -> Tensor:
        """Return a copy of one tensor, in the dtype it is stored in.

        Raises:
            InputError: there is no tensor of this name.
        """
        ...

    def read_matrix(self, view: View) -> Tensor:
        """Return one [out, in] matrix as `read` would, without reading the rest of its tensor.

        Args:
            view: the tensor and the part of it to read.
        """
        ...


class Stored(Source, Protocol):
    """A source in a folder whose `config.json` transformers reads, and which reads ahead."""

    def read_ahead(self, names: Iterable[str]) -> None:
        """Let the system read tensors from the disk while something else is computed."""
        ...

    @property
    def folder(self) -> Path:
        """Where it is."""
        ...
