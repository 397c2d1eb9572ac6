"""The command line: a thin shell over the public verbs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from bitknap.cli.argument_names import in_options
from bitknap.cli.options.commands import Group, missing
from bitknap.cli.terminal import fail, print_any_name, quiet
from bitknap.disk.append_log import no_room
from bitknap.errors import BitknapError
from bitknap.version import __version__


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a `BitknapError` becomes one line on stderr and exit status 2."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    print_any_name()
    try:
        with quiet():
            words = None if argv is None else list(argv)
            bitknap.main(args=words, prog_name="bitknap", standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.MissingParameter as error:
        fail(missing(error))
    except click.ClickException as error:
        fail(error.format_message())
    except BitknapError as error:
        fail(in_options(str(error)))
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        fail("the device is out of memory; free some of it, or compute with --device cpu")
    except OSError as error:
        fail(f"{error.filename or 'output'}: {no_room(error) or error.strerror or error}")


def _out_of_memory(error: RuntimeError) -> bool:
    """Return whether torch found no memory; commands without tensors do not import it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


# Location and description of each command, in the order of the help.
_COMMANDS = {
    "inspect": ("bitknap.cli.inspect_command:inspect", "Show the size and the budgets of a model."),
    "estimate": (
        "bitknap.cli.estimate_command:estimate",
        "Measure what each format costs each matrix.",
    ),
    "import": (
        "bitknap.cli.exchange.import_command:import_costs",
        "Turn measurements of other tools into a cost table.",
    ),
    "solve": ("bitknap.cli.solve_command:solve", "Choose formats that fit a budget."),
    "quantize": (
        "bitknap.cli.quantize_command:quantize",
        "Estimate, solve and write a packed model in one go.",
    ),
    "export": (
        "bitknap.cli.exchange.export_command:export",
        "Write a plan as files of llama.cpp, MLX, vLLM and others.",
    ),
    "evaluate": (
        "bitknap.cli.evaluate_command:evaluate",
        "Measure perplexity, and KL to another model.",
    ),
    "compare": (
        "bitknap.cli.compare_command:compare",
        "Compare ways to allocate bits at equal sizes.",
    ),
    "study": ("bitknap.cli.study.group:study", "Search plans by measured KL, with Optuna."),
    "convert": (
        "bitknap.cli.exchange.convert_command:convert",
        "Change the byte layout of a packed model.",
    ),
    "show": ("bitknap.cli.show_command:show", "Show what a plan, table or packed model contains."),
    "list": ("bitknap.cli.list_command:list_names", "List the names that commands take."),
    "completion": (
        "bitknap.cli.completion_command:completion",
        "Print the script that makes a shell complete commands.",
    ),
}

bitknap = click.version_option(__version__)(
    Group(
        "bitknap",
        homes=_COMMANDS,
        examples=("bitknap quantize reference:mixtral --budget 2.5bpw -o out",),
        help="Choose how many bits each expert of a Mixture-of-Experts model gets, prove the "
        "choice, and write the packed model.",
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
)
