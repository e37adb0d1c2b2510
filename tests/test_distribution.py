"""What pip installs: the package alone, whole, and running without the checkout."""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
NAME = "lightning_muon"

pytestmark = pytest.mark.slow


def run(*words: str | Path, **kwargs) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=200, **kwargs)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", folder, cwd=ROOT)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, as pip does where there is no wheel, and without network."""
    folder = tmp_path_factory.mktemp("wheel")
    offline = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    run(sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", folder, sdist)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Site-packages with nothing but the package."""
    folder = tmp_path_factory.mktemp("site")
    offline = ["--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check"]
    run(sys.executable, "-m", "pip", "install", *offline, "--target", folder, wheel)
    return folder


def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_the_wheel_has_all_of_the_package_and_nothing_beside(wheel: Path) -> None:
    """``tests`` or ``examples`` in site-packages would hide those of other projects."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    files = {path for path in (ROOT / NAME).rglob("*") if path.is_file() and path.parent.name != "__pycache__"}
    assert {name for name in names if name.startswith(f"{NAME}/")} == {str(path.relative_to(ROOT)) for path in files}
    assert f"{NAME}/py.typed" in names
    others = {name.partition("/")[2] for name in names if not name.startswith(f"{NAME}/")}
    assert others == {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git knows which files are of the project")
def test_the_source_distribution_has_what_it_takes_to_test_it(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    of_the_project = {name for name in run("git", "ls-files", cwd=ROOT).splitlines() if not name.startswith(".")}
    assert of_the_project <= names
    assert "README.md" in of_the_project


def test_the_page_on_the_index_links_to_the_files_of_this_version(wheel: Path) -> None:
    """A relative link or image leads nowhere there."""
    found = metadata(wheel)
    page, version = found.get_payload(decode=True).decode(), found["Version"]
    repository = dict(text.split(", ") for text in found.get_all("Project-URL"))["Repository"]
    assert found["Description-Content-Type"] == "text/markdown"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.compile(r"^```.*?^```", flags=re.DOTALL | re.MULTILINE)
    assert code.findall(page) == code.findall(readme)
    links = [re.findall(r"\]\(([^)\s]+)\)", code.sub("", text)) for text in (page, readme)]
    for link, written in zip(*links, strict=True):
        assert re.match("https?:", link), link
        if not re.match("https?:", written):
            place, _, path = link.removeprefix(f"{repository}/").partition(f"/v{version}/")
            assert place in ("blob", "raw")
            assert (ROOT / path.partition("#")[0]).exists(), path
    assert f"{repository}/raw/v{version}/" in page or "![" not in code.sub("", readme)


SCRIPT = """
import runpy, sys
import lightning_muon
exec(compile(open("snippet.py").read(), "snippet.py", "exec"), {"__name__": "snippet"})
print("package:", lightning_muon.__file__)
print("checkout:", {"examples", "tests", "configs", "hatch_build"} & {name.partition(".")[0] for name in sys.modules})
sys.argv = [sys.argv[1], "--help"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_installed_package_runs_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    """The first code of the quickstart, and the console script."""
    quickstart = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    (tmp_path / "snippet.py").write_text(re.findall(r"```python\n(.*?)```", quickstart, flags=re.DOTALL)[0])
    script = installed / "bin" / "lightning-muon"
    # -S leaves out the .pth files of this environment, one of which leads to the checkout.
    places = [installed, *(place for place in sys.path if Path(place).name in ("site-packages", "dist-packages"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places))}
    printed = run(sys.executable, "-S", "-c", SCRIPT, script, cwd=tmp_path, env=environment)
    assert f"package: {installed / NAME / '__init__.py'}\n" in printed
    assert "checkout: set()\n" in printed
    assert "usage: lightning-muon" in printed
    assert "partition" in printed


def test_versions_that_are_written_twice_are_the_same() -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert {word for hook in hooks for word in hook["additional_dependencies"]} == {f"ruff=={pinned['ruff']}"}
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
