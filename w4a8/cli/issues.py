"""The issue of the troubleshooting guide that an error message belongs to; the guide quotes the same words."""

import re

ISSUES = (  # part of a message -> the number of its issue
    (r"images; finish it with generate_calibration_data\.py --resume", 9),
    (r"of memory, and .+ are there", 10),
    (r"from the Hugging Face hub \(", 14),
    (r"the disk has .+ free|the disk is full", 19),
    (r"hist_edges has bins of zero width|no .*__avg_min and __avg_max for layer", 21),
    (r"is below --min-", 24),
    (r"the loss is not finite at iteration|a gradient is not finite at iteration", 25),
    (r"of another (?:calibration|training) run", 26),
    (
        r"not the file that metadata\.json was written for|truncated or damaged|not valid JSON|of version 0\.2\.0 or older",
        26,
    ),
    (r"its weights are not those that the calibration run was made with| - at `\$", 26),
    (r"say --scale-is range or --scale-is step", 27),
    (r"not what was exported \(damaged, or exchanged\)|exported from other learned weights than", 28),
    (r"holds an export; give --force|its weights are packed already", 28),
    (r"--format gguf: Q4_1 and Q5_1 have 4 and 5 bits and groups of 32", 30),
    (r"--max-bytes allows", 31),
    (r"holds only the ends of the stack of blocks", 32),
    (r"does not see this folder|not every rank came within|the ranks do not reach each other", 34),
    (r"no answer from rank|which this MLX has not", 34),
    (r"are no layer of this model's transformer|is no layer of (?:clip_l|clip_g|t5)", 35),
    (r"it was made for another model", 35),
    (r"is run in \w+ or float32|is run without guidance|holds no VAE", 35),
    (r"not the transformer that --model names|: not complete, it lacks", 35),
    (r"which this toolkit does not know|the calibration run's LoRA is not there", 35),
    (r"config\.json: \w+: '.*' is none of", 37),
    (r"a pipe or a device, not a file|more than such a file can have|the name of the folder is empty", 39),
    (r"not UTF-8, as JSON and MLX need it|this cannot be noted for the stages after it", 39),
    (r"no such (?:file|folder), and not one of", 39),
    (r"--calib-dir \S+: (?:no such folder|holds no run itself)|: a calibration folder, not a model", 42),
    (r"--resume: no run in --calib-dir", 42),
    (r"no folder that can be written|cannot write to standard output", 40),
    (r"holds a run already|holds an evaluation already", 41),
)


def issue_of(message: str) -> int | None:
    """Return the number of the issue that explains a message; None where no issue does."""
    return next((number for pattern, number in ISSUES if re.search(pattern, message)), None)


def with_issue(message: str) -> str:
    """Return a message with the number of its issue at the end, unless it names one itself."""
    number = issue_of(message)
    return message if number is None or re.search(r"\bIssue \d", message) else f"{message} (Issue {number})"
