"""Bodies of the commands on studies, and the table of all commands of `python -m experiments`."""

from tokenpool.commands import table
from tokenpool.commands.table import Command

# In the order of `python -m experiments --help`: the commands on the paper's studies, and those of `tokenpool`.
COMMANDS = {
    "reproduce": Command(
        "experiments.commands.making",
        "Run the protocol of section 5: base model, search for schedules, fine-tuning. Ends with a table and a "
        "picture.",
    ),
    "table": Command(
        "experiments.commands.showing",
        "Print a table of the paper and write it as Markdown, LaTeX and CSV: as printed, and from the runs of a "
        "preset.",
    ),
    "figure": Command(
        "experiments.commands.showing",
        "Draw a figure of the paper as PNG and PDF: from its printed numbers, and from the runs of a preset.",
    ),
    "report": Command(
        "experiments.commands.showing",
        "Write all tables and figures, and what each was made from, on one page of HTML.",
    ),
    "run": Command(
        "experiments.commands.making",
        "Make one run of a preset, as each task of a job array does. Goes on where an interrupted run stopped.",
    ),
    "submit": Command(
        "experiments.commands.making", "Submit the missing runs to Slurm, as job arrays that wait for each other."
    ),
    "status": Command(
        "experiments.commands.making",
        "Say which of the runs submitted to Slurm are done, running, queued, failed and missing.",
    ),
    "train": Command(
        "experiments.commands.training",
        "Train one setting, test it, and write weights and one JSON file. Goes on where an interrupted run stopped.",
    ),
    "share": Command(
        "experiments.commands.sharing",
        "Write the fine-tuned models of a preset for the Hugging Face Hub: weights, setting and model card.",
    ),
    "clustering-speed": Command(
        "experiments.commands.clustering",
        "Time weighted K-Medoids against an implementation that loops over images and clusters in Python.",
    ),
} | table.COMMANDS
