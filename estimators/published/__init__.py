"""Published methods, one file a paper: its signal, its costs, its ties, its allocator.

`RULES` is the one table of them. `compare`, the benchmarks, the catalogue of estimators and the
documentation read it; it needs no torch. A paper's file is named as its entry is, with `_` for
`-`. Where the entry makes plans, the file has `rule(material, progress)`, and each signal of the
entry is a class in it. Allocators that need only NumPy are in `bitknap.allocation.published`,
in files of the same names, so that they can be called without torch; all of EvoPress is there.

To add a paper, write its file and its entry here.

Most of the papers could be read only through their code, their abstracts or accounts of them.
So formulas are written out, and `numbers` says which numbers of equations are known, and from
what; the docstring of a paper's file repeats that sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One published method.

    Attributes:
        title: its name in reports.
        source: the paper's number or the program's part, for one column of a report.
        citation: authors, title or venue, and where to find it.
        numbers: numbers of the equations, sections and algorithms, and where they were read; or
            why none are given.
        year: year of publication.
        cost: the cost that it minimises, or its signal.
        ties: the profile that says which units share a format; "" if it makes no plans.
        allocator: how it chooses formats; "" if it makes no plans.
        missing: parts that are not reproduced, or differ from the authors' version.
        signals: signal classes in its file, by their `--estimator` names.
        plans: whether its file has `rule`, so that `compare --strategies` and the benchmark accept
            its key.
        texts: whether it plans from passes over several texts.
    """

    title: str
    source: str
    citation: str
    numbers: str
    year: int
    cost: str
    ties: str = ""
    allocator: str = ""
    missing: tuple[str, ...] = ()
    signals: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    plans: bool = True
    texts: bool = False

    @property
    def cites(self) -> str:
        """The citation with the numbers of equations, for lists and the documentation."""
        return f"{self.citation}. {self.numbers}"


# Differences common to all methods here; `missing` lists each method's own.
COMMON = (
    "The quantizer is the one that the plan is written with, even if the authors measure with "
    "another.",
    "Gradients are those of labels drawn from the model, even if the authors use the labels of "
    "the text.",
)

RULES: Mapping[str, Published] = MappingProxyType(
    {
        "chowdhury": Published(
            title="Chowdhury",
            source="arXiv 2604.06515",
            citation="Chowdhury et al., ICLR 2026, arXiv 2604.06515, and its code",
            numbers="Section 4 has the theorem; equation numbers are not given: the paper was read "
            "through its code and a note of it.",
            year=2026,
            cost="Λ = ‖w_T‖ − ‖w_0‖ of an expert's router row, small is sensitive; then MaxVar, "
            "the largest variance of a row of its first matrix: an expert moves ahead of those "
            "whose MaxVar is a third of its own or less (ζ = 3)",
            ties="expert",
            allocator="the same average in every layer; two or three widths counted out by rank",
            missing=(
                "The paper leaves open which pair is exchanged first; both the code's single "
                "pass and exchanges until nothing changes are available.",
                "Without a checkpoint from before training, the final norm is used alone, as in "
                "the paper for Mixtral.",
            ),
            signals=MappingProxyType({"max-var": "MaxVar", "router-norm": "RouterNorm"}),
        ),
        "mc-moe": Published(
            title="MC-MoE",
            source="arXiv 2410.06270",
            citation="Huang et al., MC-MoE (PMQ), ICLR 2025, arXiv 2410.06270, and its code",
            numbers="Eq. 4 is what the program minimises, as reviews of the paper number it; the "
            "paper's text was not at hand.",
            year=2025,
            cost="phi^1 w^1.5 eps^1, with the code's exponents: frequency, routing weight, and "
            "change of the block's output with one expert at one width",
            ties="expert",
            allocator="an exact program for each layer: a sum of bits, at least one expert at 3 "
            "and one at 2",
            missing=(
                "Routing weights are taken after renormalisation; the authors take them before.",
                "Pruning of tokens (ODP) is left out.",
            ),
            signals=MappingProxyType(
                {"frequency": "Frequency", "mc-moe": "McMoe", "routing-weight": "RoutingWeight"}
            ),
        ),
        "mxmoe": Published(
            title="MxMoE",
            source="arXiv 2505.05799",
            citation="Duanmu et al., MxMoE, ICML 2025, arXiv 2505.05799, and its code",
            numbers="Eq. 5 is L, eq. 6 the cost and eq. 7 the program, as an account of the paper "
            "numbers them; its text was not at hand.",
            year=2025,
            cost="‖Ô − O‖ of a decoder layer's output with one matrix rounded, not squared",
            ties="gate_eq_up",
            allocator="L^r T^(1−r) for each layer at the same average; r = 1 for weights alone",
            missing=(
                "The time of the authors' kernels is not measured here; give it as a limit to "
                "`MxMoe(exponent=r)`.",
                "Activations are not quantized.",
            ),
        ),
        "gemq": Published(
            title="GEMQ",
            source="arXiv 2605.23078",
            citation="Deng et al., GEMQ, ICML 2026, arXiv 2605.23078, and its code",
            numbers="Equation numbers are not given: the paper was read through its code and a "
            "note of it.",
            year=2026,
            cost="Σ g² Δz² over tokens: gradient at the layer's output, change of the block's "
            "output with one expert at one width",
            ties="expert",
            allocator="one program over all layers: a sum of bits, in each layer one expert at the "
            "widest and one at the second widest",
            missing=("Training of the router and repeated estimation are left out.",),
        ),
        "moqa": Published(
            title="MoQa",
            source="arXiv 2503.21135",
            citation=(
                "Zheng et al., MoQa, later DynaMo (DATE 2026), arXiv 2503.21135; read in "
                "abstracts and a summary"
            ),
            numbers="Equation numbers are not given: the paper's text was not at hand.",
            year=2025,
            cost="an expert's share of its layer's significance, over several calibration sets",
            ties="expert",
            allocator="fuzzy c-means of the shares, one width per cluster; there is no budget",
            missing=(
                "The available texts do not state the significance of a channel, the fuzzifier "
                "and the boundary; Bitknap's choices stand in.",
                "The channels that stay in fp16 when the data changes are left out.",
            ),
            texts=True,
        ),
        "xie": Published(
            title="Xie (rows)",
            source="2025.findings-acl.1386",
            citation=(
                "Xie et al., Automated Fine-Grained MoE Quantization, Findings of ACL 2025, "
                "2025.findings-acl.1386; read in its abstract and a note on the formula"
            ),
            numbers="Equation numbers are not given: the paper's text was not at hand.",
            year=2025,
            cost="S_c = alpha K_c V_c + (1 − alpha) O_c of a channel, times its variance and the "
            "format's distortion",
            ties="free",
            allocator="the knapsack over output rows, as the authors' allocator is not published",
            missing=(
                "The available texts do not state K, V, O, the channel's axis, the widths and "
                "the allocator; Bitknap's choices stand in.",
            ),
            signals=MappingProxyType({"channel": "ChannelScore"}),
        ),
        "fri-mxmoe": Published(
            title="FRI-MxMoE",
            source="2026.acl-long.982",
            citation="Qi et al., FRI-MxMoE, ACL 2026, 2026.acl-long.982",
            numbers="Equation numbers are not given: none were noted when the paper was read.",
            year=2026,
            cost=(
                "frequency × loss of a matrix, interpolated by inverse distance from rules; a "
                "quarter of the cells are measured for them"
            ),
            ties="free",
            allocator="a Lagrangian multiplier, steered by bisection",
            missing=(
                "Losses are measured KL; the authors take changes of perplexity or squared errors.",
                "The latency of the authors' device is left out.",
            ),
        ),
        "alphaq": Published(
            title="AlphaQ",
            source="arXiv 2606.04980",
            citation="Yang et al., AlphaQ, arXiv 2606.04980, and its code",
            numbers="A note of the paper takes the cost from sections 3.2 and 3.3; equation "
            "numbers are not given: the paper's text was not at hand.",
            year=2026,
            cost="(median alpha / alpha)^gamma Var(W) 2^(−2b), with Hill's estimate alpha of the "
            "tail of the spectrum",
            ties="free",
            allocator="the knapsack; the authors also solve one program over all layers",
            missing=(
                "Sub-matrices are evenly spaced; the authors draw them at random.",
                "The average is over weights; the authors' is over matrices.",
                "gamma is 1, as in the function of the authors' code; their script passes 10.",
            ),
            signals=MappingProxyType({"alphaq": "AlphaQ"}),
        ),
        "hawq": Published(
            title="HAWQ",
            source="arXiv 1911.03852",
            citation="Dong et al., HAWQ-V2, NeurIPS 2020, arXiv 1911.03852",
            numbers="Eq. 2.11 is Ω, whose sum the front compares, as the caption of figure 4 says; "
            "the rest of the paper's text was not at hand.",
            year=2020,
            cost="mean trace of the Hessian × ‖ΔW‖²",
            ties="free",
            allocator=(
                "the knapsack; the authors take the plan of least cost on the front of size and "
                "cost"
            ),
            missing=("The Fisher diagonal stands in for Hutchinson's estimate of the trace.",),
            signals=MappingProxyType({"hessian-trace": "HessianTrace"}),
        ),
        "exllamav2": Published(
            title="ExLlamaV2",
            source="its annealing",
            citation="ExLlamaV2, `measure_quant`, `optimize` and `sim_anneal` of its code",
            numbers="There is no paper: `test_error` of the code is the cost.",
            year=2023,
            cost="‖ΔW x‖ / ‖W x‖ over the calibration inputs",
            ties="layer",
            allocator=(
                "simulated annealing of Σ cost^n; n is chosen so that the largest cost is smallest"
            ),
            missing=(
                "The authors measure whole modules and average the ratios of sequences; here the "
                "costs of matrices are added up, each with one ratio over all tokens.",
                "8 seeded chains per stage; the authors run 80 without a seed.",
            ),
            signals=MappingProxyType({"exl2": "Exl2Score"}),
        ),
        "autoround": Published(
            title="AutoRound",
            source="AutoScheme",
            citation="Intel AutoRound, AutoScheme (delta loss) of its code; Cheng et al., "
            "SignRoundV2, arXiv 2512.04746",
            numbers="Eq. 3 of SignRoundV2 is the score, as an account of that paper numbers it; "
            "its text was not at hand.",
            year=2025,
            cost="Σ |g ΔW|",
            ties="layer",
            allocator="the knapsack",
            missing=(
                "Root mean square gradients stand in for |g|, which is not recorded with its "
                "sign; the authors' are of the model with the format in place.",
                "The share of quantized activations is left out.",
            ),
            signals=MappingProxyType({"autoround": "AutoRoundScore"}),
        ),
        "mlx-lm": Published(
            title="mlx-lm",
            source="its dynamic_quant",
            citation="mlx-lm, `dynamic_quant`; NVIDIA ModelOpt, `auto_quantize`, is alike",
            numbers="There is no paper: `estimate_sensitivities` and `estimate_threshold` of "
            "mlx-lm's code are the rule.",
            year=2025,
            cost="Σ |g ΔW| per weight, at the lower width minus at the higher",
            ties="layer_proj",
            allocator="two widths, and a threshold on the gain",
            missing=(
                "The authors' cost is Σ g (W_low − W_high) with its sign, where g is the "
                "gradient of the KL to the original, at the lower width; here it is the "
                "difference of two sums.",
                "Root mean square gradients of the original model stand in for g.",
                "ModelOpt's sensitivity is a forward KL, which is not measured for this rule.",
            ),
        ),
        "owq": Published(
            title="OWQ",
            source="arXiv 2306.02272",
            citation="Lee et al., OWQ, AAAI 2024, arXiv 2306.02272, and its code",
            numbers="Equation numbers are not given: the paper was read through its code and "
            "accounts of it.",
            year=2024,
            cost="λ_j ‖ΔW_j‖² of input columns, λ_j = 2 E[a² x_j²]; the mean of the worst columns",
            missing=(
                "The authors keep the worst columns in fp16 and score no matrices; taking the "
                "mean is Bitknap's choice.",
            ),
            signals=MappingProxyType({"owq": "Owq"}),
            plans=False,
        ),
        "quantmoe-bench": Published(
            title="QuantMoE-Bench",
            source="arXiv 2406.08155",
            citation="Li et al., QuantMoE-Bench, arXiv 2406.08155, and its code",
            numbers="Equation numbers are not given: the paper was read through its code and its "
            "abstract.",
            year=2024,
            cost="the largest over input columns of max |w| / mean |w|",
            missing=("Its hand-written recipes (first layers, shared experts) are left out.",),
            signals=MappingProxyType({"outlier-ratio": "OutlierRatio"}),
            plans=False,
        ),
        "evopress": Published(
            title="EvoPress",
            source="arXiv 2410.14649",
            citation="Sieberling et al., EvoPress, ICML 2025, arXiv 2410.14649, and its code",
            numbers="Algorithm 1 is the search, as an account of the paper gives it; equation "
            "numbers are not given: the paper's text was not at hand.",
            year=2025,
            cost="the measured KL of whole plans; no table",
            ties="free",
            allocator="mutation by level switches, selection in stages; `--strategies evolution`",
            missing=(
                "The stages use parts of one text; the authors' stages use more and more tokens.",
                "One start; Algorithm 1 takes the fittest of several.",
                "Offspring may repeat; their code draws again, also for too many switches or too "
                "few bits.",
            ),
            plans=False,
        ),
    }
)
