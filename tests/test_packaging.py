"""What a clone must hold: requirements that cover the imports, small files without pickle, a README that tells the truth."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
OWN = {"flora", "profiling", "app", "tests"} | {path.stem for path in ROOT.glob("tests/**/*")}
LARGEST_ASSET = 10 * 1024**2  # bytes; hosted demos want larger files out of plain git
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
ASKED_FOR = ["playwright"]  # `python -m profiling targets --part page` says where it comes from, where it is missing
WITH_TORCH = {"triton"}
"""What PyTorch's builds for GPUs bring and others lack; `flora.backend` does without."""
BINARY = (".safetensors", ".flac", ".wav", ".png", ".ico", ".woff2")


@cache
def tracked() -> tuple[Path, ...]:
    """Every file git knows or would take, that exists: what is submitted, not what a build left behind."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git work tree: what is tracked cannot be told")
    return tuple(path for path in (ROOT / name for name in listing.split("\0") if name) if path.is_file())


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def requirements(name: str) -> list[Requirement]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def code(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imported(path: Path, module_level: bool = False) -> set[str]:
    """Dotted names that a file imports, `from a import b` as a.b; lazily too, unless module_level. Imports for types only count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if not module_level else _outside_functions(tree)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parts[: -node.level]
            names.update(".".join([*package, *filter(None, [node.module]), alias.name]) for alias in node.names)
    return names


def _outside_functions(node: ast.AST):
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from _outside_functions(child)


def tops(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


# -------------------------------------------------------------------------------------------------------- requirements


def test_requirements_are_ranges_that_the_promised_versions_satisfy():
    ranges = {canonicalize_name(entry.name): entry.specifier for entry in requirements("requirements.txt")}
    assert {"gradio", "torch", "transformers", "bitsandbytes", "plotly", "torch-tb-profiler", "pandas"} <= set(ranges)
    for name, version in (("torch", "2.8.0"), ("torch", "2.13.0"), ("gradio", "6.31.0")):
        assert version in ranges[name], f"{name} {version} is promised and {name}{ranges[name]} excludes it"
    assert "7.0" not in ranges["gradio"] and "6.30.0" not in ranges["gradio"]
    for entry in requirements("requirements.txt") + requirements("requirements-dev.txt"):
        assert entry.url is None
        assert entry.specifier and all(part.operator not in ("==", "===") for part in entry.specifier), f"{entry} is no range"


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt", "Makefile", "Dockerfile", ".ci/run", ".ci/peft"])
def test_no_file_names_a_package_index(name):
    assert not re.search(r"index-url|find-links|--index|download\.pytorch", (ROOT / name).read_text(encoding="utf-8"))


def distributions_of(files: list[Path]) -> dict[str, str]:
    """Top-level module → the file that imports it first, standard library and own modules left out."""
    found: dict[str, str] = {}
    for path in files:
        for module in sorted(tops(imported(path)) - set(sys.stdlib_module_names) - OWN - {"__future__"}):
            found.setdefault(module, relative(path))
    return found


@pytest.mark.parametrize("files", ["product", "tests"])
def test_every_import_is_a_requirement(files):
    """What is imported by name is required by name, not left to come along with something else."""
    known = [canonicalize_name(entry.name) for entry in requirements("requirements.txt")]
    paths = [*code("flora", "profiling"), ROOT / "app.py"]
    if files == "product":
        known += [*WITH_TORCH, *ASKED_FOR]
    else:
        known += [canonicalize_name(entry.name) for entry in requirements("requirements-dev.txt")]
        paths = code("tests")
    providers = packages_distributions()
    for module, path in distributions_of(paths).items():
        names = {canonicalize_name(name) for name in providers.get(module, [module])}
        assert names & set(known), f"{path} imports {module}, which no requirement brings"


# --------------------------------------------------------------------------------------------------------- imports


def test_flora_knows_nothing_of_the_page_or_the_measuring():
    for path in code("flora"):
        forbidden = tops(imported(path)) & {"gradio", "gradio_client", "plotly", "pandas", "profiling", "app"}
        assert not forbidden, f"{relative(path)} imports {sorted(forbidden)}"


def test_only_the_dashboard_knows_gradio():
    for path in code("profiling"):
        names = imported(path)
        assert "app" not in tops(names), f"{relative(path)} imports app"
        if not path.is_relative_to(ROOT / "profiling" / "dashboard"):
            assert not tops(names) & {"gradio", "gradio_client"}, f"{relative(path)} imports gradio"
            assert not any(name.startswith("profiling.dashboard") for name in names), f"{relative(path)} imports the dashboard"


def test_the_door_holds_no_tensor_and_no_chart():
    assert not tops(imported(ROOT / "app.py", module_level=True)) & {"torch", "plotly", "pandas", "numpy"}


def test_the_scheduler_imports_no_torch_and_the_ops_no_bank():
    assert not tops(imported(ROOT / "flora/engine/scheduler.py")) & {"torch", "transformers"}
    assert not any(name.startswith(("flora.bank", "flora.engine")) for name in imported(ROOT / "flora/ops.py"))


def test_the_engine_knows_nothing_of_triton():
    for path in code("flora/engine"):
        names = imported(path)
        assert "triton" not in tops(names) and not any(name.startswith("flora.kernels") for name in names), relative(path)


# ----------------------------------------------------------------------------------------------------------- files


def test_assets_are_small():
    for path in (ROOT / "assets").rglob("*"):
        if path.is_file():
            assert path.stat().st_size <= LARGEST_ASSET, f"{relative(path)} has {path.stat().st_size} bytes"


def test_nothing_tracked_can_be_a_pickle():
    for path in tracked():
        assert path.suffix.lower() not in PICKLES, relative(path)
        with path.open("rb") as file:
            start = file.read(4)
        assert not (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05"), f"{relative(path)} begins like a pickle"
        assert start != b"PK\x03\x04", f"{relative(path)} is a zip, as PyTorch's pickles are"


def test_no_file_names_a_place_on_somebodys_machine():
    """No absolute path of a home or work folder: it would work on one machine only."""
    place = re.compile(r"(?<![\w.:/~-])/(?:home|Users|root|work|mnt|data|tmp|private)/[\w.-]+")
    allowed = {"Dockerfile": str(Path("/", "home", "user"))}  # the image's own user
    for path in tracked():
        if path.suffix.lower() in BINARY:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for match in place.findall(line):
                own = allowed.get(relative(path))
                assert own and match.startswith(own), f"{relative(path)}:{number} names {match}"


# ---------------------------------------------------------------------------------------------------------- README


def readme() -> tuple[dict, str]:
    """Its YAML head and its body."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    head, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL).groups()
    return yaml.safe_load(head), body


def test_the_readme_has_the_head_of_a_hosted_space():
    head, _ = readme()
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert head["title"] and head["colorFrom"] in colours and head["colorTo"] in colours
    assert head["sdk"] == "gradio" and head["sdk_version"] == "6.31.0"
    assert (ROOT / head["app_file"]).is_file()
    assert isinstance(head["python_version"], str) and head["python_version"] in ("3.10", "3.11", "3.12", "3.13")
    assert head["pinned"] is False and head["license"] == "apache-2.0"
    assert len(head["short_description"]) <= 60
    gradio = next(entry for entry in requirements("requirements.txt") if entry.name == "gradio")
    assert head["sdk_version"] in gradio.specifier


def test_the_readme_points_at_files_that_are_there():
    _, body = readme()
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", body)
    targets = [link for pair in links for link in pair if link and not re.match(r"[a-z]+:|#", link)]
    assert targets
    for target in targets:
        assert (ROOT / target.split("#")[0]).exists(), f"README.md links to {target}, which is not there"


def test_the_readme_is_plain():
    _, body = readme()
    pictographs = re.findall("[\U0001f000-\U0001faff\u2600-\u27bf]", body)
    assert not pictographs, f"pictographs in the README's body: {pictographs}"


def test_the_readmes_tree_names_what_is_there():
    """Every name at the start of a line of the annotated tree exists."""
    _, body = readme()
    tree = re.search(r"```\n(app\.py .*?)```", body, re.DOTALL).group(1)
    stack: list[tuple[int, Path]] = []
    for line in filter(str.strip, tree.splitlines()):
        indent = len(line) - len(line.lstrip())
        if indent > 24:  # a remark that goes on
            continue
        stack = [(depth, folder) for depth, folder in stack if depth < indent]
        above = stack[-1][1] if stack else ROOT
        for name in re.split(r"\s{2,}", line.strip())[0].split():
            assert (above / name).exists(), f"README.md's tree names {name}, which is not in {relative(above) or 'the project'}"
            stack.append((indent, above / name))


# --------------------------------------------------------------------------------------------------------- commands


def test_a_file_that_holds_a_script_is_executable():
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License\n                           Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_make_lists_its_targets():
    listing = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("demo", "test", "test-peft", "lint", "clean"):
        assert re.search(rf"^make {target} ", listing, re.MULTILINE)


@pytest.mark.parametrize("script", ["run", "venv", "apt", "tools", "peft"])
def test_scripts_parse(script):
    shell = "bash" if script == "run" else "sh"
    subprocess.run([shell, "-n", str(ROOT / ".ci" / script)], check=True)
