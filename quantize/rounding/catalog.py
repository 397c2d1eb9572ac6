"""Ways of rounding by the names that the command line knows; it needs no torch."""

from __future__ import annotations

from bitknap.names import Catalog, Entry

_PLACE = "bitknap.quantization.rounding.methods"
METHODS = Catalog(
    what="method",
    rows=(
        Entry(
            name="rtn",
            about="Rounding to nearest with a search for each group's range; the default.",
            place=f"{_PLACE}:Rtn",
        ),
        Entry(
            name="hqq",
            about="Half-quadratic quantization; weights alone.",
            place=f"{_PLACE}:Hqq",
            cites="Badri and Shaji, HQQ, 2023",
        ),
        Entry(
            name="gptq",
            about="GPTQ with activation order and damping by token count; reads a text.",
            place=f"{_PLACE}:Gptq",
            cites="Frantar et al., GPTQ, ICLR 2023, arXiv 2210.17323",
        ),
        Entry(
            name="midtread",
            about="Rounding to nearest on grids with a code for zero, for other runtimes.",
            place=f"{_PLACE}:Midtread",
        ),
        Entry(
            name="ggml",
            about="ggml's own rounding to the types of GGUF files; reads a text.",
            place="bitknap.quantization.rounding.ggml:Ggml",
        ),
    ),
)
