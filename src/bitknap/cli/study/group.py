"""`bitknap study`: Optuna studies over any storage, shared by workers."""

from __future__ import annotations

from bitknap.cli.options.commands import Group

study = Group(
    "study",
    homes={
        "create": ("bitknap.cli.study.create:create", "Create a study on a cost table."),
        "run": ("bitknap.cli.study.run:run", "Measure plans; start one for each worker."),
        "show": ("bitknap.cli.study.show:show", "Show how a study stands."),
        "best": ("bitknap.cli.study.best:best", "Write the plan with the smallest measured loss."),
    },
    examples=(
        "bitknap study create s --storage sqlite:///s.db \\\n"
        "             --table table.safetensors --budget 2.5bpw",
    ),
    help="Search for plans with the smallest measured KL, in an Optuna study that workers share.",
)
