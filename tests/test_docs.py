"""The pages' commands, flags, files, links and names exist; the README stays short; figures come from dated files."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from conftest import ROOT

from tools.option_lists import option_lists
from tools.road import ROADS, again
from w4a8.cli.issues import ISSUES, issue_of, with_issue

DOCUMENTS = (
    "README.md", "TROUBLESHOOTING_GUIDE.md", "calibration_data/README.md", "CONTRIBUTING.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
)  # fmt: skip
SOURCES = [
    path
    for pattern in ("*.py", "w4a8/**/*.py", "calibration_store/**/*.py", "benchmarks/**/*.py", "tools/**/*.py")
    for path in sorted(ROOT.glob(pattern))
]
SCRIPT = re.compile(r"(?:benchmarks/|tools/)?[a-z0-9_]+\.py")


def options_of(script: str) -> set[str]:
    """Every flag of a script, of its subcommands, too."""
    command = importlib.import_module(".".join(Path(script).with_suffix("").parts)).main
    if not isinstance(command, click.Command):  # what sets up runs before click is installed
        return {"-h", "--help"}
    commands = [command, *(command.commands.values() if isinstance(command, click.Group) else ())]
    return {"-h", "--help"} | {
        flag for each in commands for parameter in each.params for flag in (*parameter.opts, *parameter.secondary_opts)
    }


def commands() -> list[tuple[str, str]]:
    """(script, the rest of the line) of every command in the documents."""
    found = []
    for name in DOCUMENTS:
        for line in (ROOT / name).read_text().splitlines():
            found += re.findall(rf"python ({SCRIPT.pattern})([^`|#\n]*)", line)
    return found


def test_there_are_commands():
    assert len(commands()) >= 10


@pytest.mark.parametrize("script", sorted({script for script, _ in commands()}))
def test_commands_exist_with_their_flags(script):
    known = options_of(script)
    for found, arguments in commands():
        if found == script:
            unknown = set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", arguments)) - known
            assert not unknown, f"{script} has no {unknown}"


def test_commands_in_sources_exist():
    """What messages and docstrings tell people to run."""
    for path in SOURCES:
        for script, arguments in re.findall(
            rf"(?:run|python) ({SCRIPT.pattern})((?: --?[a-z][a-z0-9-]*)*)", path.read_text()
        ):
            places = [ROOT / script, *ROOT.glob(f"*/{script}")]
            known = next((name for name in places if name.exists()), None)
            assert known is not None, f"{path.name} names {script}"
            unknown = set(arguments.split()) - options_of(str(known.relative_to(ROOT)))
            assert not unknown, f"{path.name}: {script} has no {unknown}"


@pytest.mark.parametrize("recipe", sorted(path.name for path in (ROOT / "runs").glob("*.sh")))
def test_recipes_run_a_road(recipe):
    text = (ROOT / "runs" / recipe).read_text()
    (road,) = re.findall(r"^exec \$PY tools/(?:road\.py (?=\w+ )|(?=sd3_medium\.py))(\w+)", text, re.MULTILINE)
    assert len(ROADS[road]) >= 4


@pytest.mark.parametrize("road", ROADS)
def test_roads_name_flags_that_exist(road):
    for line in ROADS[road]:
        script, *arguments = [*line.split(), *again(line.split()[0])]
        unknown = {word for word in arguments if word.startswith("--")} - options_of(script)
        assert not unknown, f"{road}: {script} has no {unknown}"


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.py") if path.name != "hooks.py"))
def test_a_python_without_the_packages_says_what_to_do(script):
    done = subprocess.run([sys.executable, "-S", ROOT / script, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "has no click" in done.stderr, done.stderr
    assert "make setup" in done.stderr and "activate" in done.stderr


def test_importing_a_package_ends_no_program():
    """A program that imports the packages where something is missing gets an ImportError, and goes on as it likes."""
    code = "import w4a8, calibration_store\ntry: import hooks\nexcept ImportError: print('goes on')"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == "goes on\n", done.stderr


def recipe_said(recipe, *words, **environment):
    """(exit code, stdout, stderr) of a recipe where nothing is installed."""
    command, environment = [ROOT / "runs" / recipe, *words], os.environ | {"PYTHON": "/none"} | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("recipe", sorted(path.name for path in (ROOT / "runs").glob("*.sh")))
def test_recipes_begin_nothing_by_mistake(recipe):
    code, output, errors = recipe_said(recipe, "--help")
    assert code == 0 and f"runs/{recipe} [folder]" in output and not errors and "set -euo" not in output
    assert recipe_said(recipe, "--paln")[0] == recipe_said(recipe, "one", "two")[0] == 2
    assert recipe_said(recipe, "--paln")[2].startswith("Error: --paln: not known;")
    code, output, errors = recipe_said(recipe)
    assert (code, output) == (2, "") and errors.startswith("Error: /none: not found; run `make setup` first")


def test_the_internals_show_every_module_and_script():
    """The page names what lies at the top and in the packages."""
    text = (ROOT / "docs/internals.md").read_text() + (ROOT / "README.md").read_text()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("w4a8/*"), *ROOT.glob("calibration_store/*.py")]:
        name = path.stem if path.parent.name == "calibration_store" else path.name
        assert path.name.startswith("__") or name in text, f"docs/internals.md lacks {name}"


def test_functions_that_the_walks_name_exist():
    """CONTRIBUTING's walks name functions: each is defined in the file that it is said to be in."""
    walked = re.findall(r"`([a-z_/0-9]+\.py)`: ((?:`[A-Za-z_.]+`(?:, | → )?)+)", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(walked) >= 10
    for file, names in walked:
        source = (ROOT / file).read_text()
        for name in re.findall(r"`([A-Za-z_.]+)`", names):
            assert re.search(rf"(?:def|class) {name.split('.')[-1]}\b", source), f"{file} has no {name}"


def module_file(path: str) -> bool:
    """Return whether a module or a package lies at a path below the repository."""
    return (ROOT / f"{path}.py").exists() or (ROOT / path / "__init__.py").exists()


def test_dotted_names_resolve():
    """Every w4a8.… and calibration_store.… in backticks, in the pages and in the code's prose, is a module or lies in one."""
    missing = []
    for path in [*SOURCES, *(ROOT / name for name in DOCUMENTS)]:
        for name in set(re.findall(r"`((?:w4a8|calibration_store)(?:\.\w+)+)`", path.read_text())):
            parts = name.split(".")
            files = [count for count in range(1, len(parts) + 1) if module_file("/".join(parts[:count]))]
            found = importlib.import_module(".".join(parts[: max(files)]))
            for attribute in parts[max(files) :]:
                found = getattr(found, attribute, None)
            if found is None:
                missing.append(f"{path.name}: {name}")
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_exist(document):
    text = (ROOT / document).read_text()
    for script in set(SCRIPT.findall(text)):
        assert (ROOT / script).exists() or any(
            path.name == script.rpartition("/")[2] for path in [*SOURCES, *ROOT.glob("tests/**/*.py")]
        ), f"{document} names {script}"
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / document).parent.joinpath(target).exists(), f"{document} links to {target}"


def test_flags_in_the_option_lists_exist():
    """Every --flag that a page mentions belongs to some script."""
    scripts = [path.name for path in ROOT.glob("*.py") if "\ndef main(" in path.read_text()]
    scripts += [
        f"{folder}/{path.name}"
        for folder in ("benchmarks", "tools")
        for path in (ROOT / folder).glob("*.py")
        if "@click.option" in path.read_text()
    ]
    known = set().union(*(options_of(script) for script in scripts)) | {
        "--no-deps",
        "--shifted-…",
        "--hosts",
        "--hostfile",
        "--python",
        "--plan",
        "--backend",
        "--starting-port",
        "--local-dir",
        "--recursive",
    }
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text)) - known <= {"--shifted-"}, document


def guide_issues() -> dict[int, str]:
    """Return {number: text} of every issue, in the guide and, for people who write hooks, in docs/internals.md."""
    pages = ((ROOT / name).read_text() for name in ("TROUBLESHOOTING_GUIDE.md", "docs/internals.md"))
    pattern = r"^### Issue (\d+): .*\n((?:(?!^##? |^### ).*\n?)*)"
    return {int(number): text for page in pages for number, text in re.findall(pattern, page, re.MULTILINE)}


def quoted(text: str) -> list[str]:
    """Return the messages that an issue quotes after "You see"."""
    seen = re.findall(r"^\*\*You see\*\*(.*\n(?:.+\n)*)", text, re.MULTILINE)
    found = [a or b for part in seen for a, b in re.findall(r"``(.+?)``|`([^`]+)`", part.replace("\n", " "))]
    return [message.strip("` ") for message in found]


def test_messages_point_at_issues_that_exist():
    numbers = set(guide_issues())
    assert numbers == set(range(1, len(numbers) + 1))
    for path in [*SOURCES, *(ROOT / name for name in (*DOCUMENTS, "Makefile", "requirements.txt"))]:
        for number in re.findall(r"\bIssues? (\d+)\b", path.read_text()):
            assert int(number) in numbers, f"{path.name} points at Issue {number}"


def test_every_issue_quotes_its_messages_or_says_that_there_is_none():
    for number, text in guide_issues().items():
        assert quoted(text) or "**You see** no message" in text, f"Issue {number}"


def test_error_messages_name_the_issue_that_quotes_them():
    """Every message that the guide quotes and an error ends with leads to its own issue; every pattern is quoted somewhere."""
    led = set()
    for number, text in guide_issues().items():
        for message in quoted(text):
            found = issue_of(message)
            assert found in (None, number) or {found, number} == {13, 19}, (
                f"{message}: Issue {found}, quoted by {number}"
            )
            led |= {found}
    assert {number for _, number in ISSUES} <= led
    assert with_issue("holds a run already: say") == "holds a run already: say (Issue 41)"
    assert with_issue("holds a run already (Issue 26)") == "holds a run already (Issue 26)"


def test_the_index_of_messages_is_whole():
    """Each row's message is quoted by its issue, and each message that an error ends with an issue for is in the index."""
    index = (ROOT / "TROUBLESHOOTING_GUIDE.md").read_text().partition("## Index of messages")[2]
    rows = {
        message.strip("`"): int(number)
        for message, number in re.findall(r"^\| (`.+`) \| (\d+) \|$", index, re.MULTILINE)
    }
    issues = guide_issues()
    for message, number in rows.items():
        assert message in quoted(issues[number]), f"{message}: not in Issue {number}"
    for number, text in issues.items():
        for message in quoted(text):
            assert issue_of(message) is None or message in rows, f"the index lacks {message} of Issue {number}"


def test_the_readme_says_where_everything_installs():
    """The newest table of tools/check_install.py is of today's requirements and lacks no file; the README says what it says."""
    path = max((ROOT / "benchmarks/results").glob("*-install.json"))
    table = json.loads(path.read_text())

    def listed(text: str) -> list[str]:
        return [line for line in text.splitlines() if line and not line.startswith("#")]

    for name, text in table["requirements"].items():
        assert listed(text) == listed((ROOT / name).read_text()), f"{name} has changed: run tools/check_install.py"
    assert set(table["files"]) == {"linux-x86_64", "linux-aarch64", "macos-arm64"}
    pythons = [list(found) for found in table["files"].values()]
    assert pythons == [["3.10", "3.11", "3.12", "3.13", "3.14"]] * 3
    missing = [
        (system, python, package)
        for system, by_python in table["files"].items()
        for python, files in by_python.items()
        for package, file in files.items()
        if file is None
    ]
    assert not missing
    readme = (ROOT / "README.md").read_text()
    assert f"benchmarks/results/{path.name}" in readme and "Python 3.10 to 3.14" in readme
    with_flip = {
        python
        for by_python in table["files"].values()
        for python, files in by_python.items()
        if "flip-evaluator" in files
    }
    assert max(with_flip) == "3.13" and "up to Python 3.13 and not on Linux ARM" in readme
    assert not any("flip-evaluator" in files for files in table["files"]["linux-aarch64"].values())


def test_the_readme_is_short():
    """A stranger reads it to its end: 200 lines, 1,500 words, no line that a page of the repository would cut."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200 and len(text.split()) <= 1500
    assert max(len(line) for line in text.splitlines()) <= 130


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    """Files exist, and a page has the heading that a link names after #."""
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", (ROOT / document).read_text()):
        path = (ROOT / document).parent / target if target else ROOT / document
        assert path.exists(), f"{document} links to {target}"
        headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE) if anchor else []
        found = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in found, f"{document}: {target}#{anchor}"


@pytest.mark.parametrize("document", ["README.md", "docs/results.md"])
def test_figures_come_from_dated_files(document):
    """Every number with decimals outside of code stands in a file of benchmarks/results, perhaps with more digits."""
    files = [path.read_text() for path in (ROOT / "benchmarks/results").glob("20*")]
    known = {float(number) for text in files for number in re.findall(r"\d+\.\d+", text)}
    known |= {
        int(number) / unit for text in files for number in re.findall(r"\b\d{5,12}\b", text) for unit in (1e3, 1e6, 1e9)
    }
    text = re.sub(r"```.*?```|`[^`]*`", "", (ROOT / document).read_text(), flags=re.DOTALL)
    text = re.sub(
        r"(?:SD|FLUX|Python|glibc|MLX|Karras|version) ?\.?\d+\.\d+(?:\.\d+)?|\b\d+\.\d+\.\d+\b|3\.5\b|FLUX\.1", "", text
    )
    missing = []
    for number in re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]*\d)", text):
        digits = len(number.partition(".")[2])
        if not any(round(each, digits) == float(number) for each in known):
            missing.append(number)
    assert not missing, f"{document}: {missing} stand in no file of benchmarks/results"


def test_the_option_lists_are_those_of_help():
    page = (ROOT / "docs/stages.md").read_text()
    assert page.endswith(option_lists()), "run tools/option_lists.py"
