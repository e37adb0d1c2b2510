"""Rules beside the code of their authors, which is read from clones and never copied. Opt-in:

    git clone https://github.com/KellerJordan/Muon ~/clones/Muon     # and the others of CASES, by their own names
    LIGHTNING_MUON_AUTHORS=~/clones python -m pytest tests/optim/test_authors_code.py -rs

Both get the same float32 matrices and take 10 steps at changing learning rates, without and with weight decay. What the
authors' code computes in bfloat16 is computed in float32, its ``torch.compile`` is left out, and one process stands for
all of its ranks. A case whose clone is absent, or needs a package that is not installed, is skipped and says so.
"""

from __future__ import annotations

import ast
import importlib
import importlib.machinery
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_muon.partition import MatrixLayout
from tests.optim.references import REFERENCES
from tests.optim.rule_cases import rule_class
from tests.optim.rule_walk import relative

FOLDER = os.environ.get("LIGHTNING_MUON_AUTHORS")
LRS = (0.02, 0.05, 0.01, 0.03, 0.04, 0.02, 0.03, 0.01, 0.02, 0.01)
SHAPES = {"tall": (12, 5), "wide": (5, 12), "square": (7, 7), "batch": (4, 6, 8)}

Params = list[nn.Parameter]
Make = Callable[[Any, Params, float], Optimizer]  # from the authors' module, 2-D parameters and weight decay


def polar_factor(matrices: Tensor, epsilon: float | None = None) -> Tensor:
    """For code that takes a function of one's own for its iterations."""
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    return u @ vh


@dataclass(frozen=True)
class Case:
    """A rule and the code that it is to equal.

    Args:
        rule: name of the package's class.
        repository: owner and name on GitHub; the clone's folder has the name.
        commit: that the case was written for.
        module: file of the code.
        make: makes the authors' optimizer.
        options: of the package's class.
        only: names to take from a file that cannot be imported, such as a training script.
        tolerance: largest distance, in parts of the authors' movement.
        with_decay: the same with weight decay; say at the case why it is larger.
        decays: whether the authors' code knows weight decay.
    """

    rule: str
    repository: str
    commit: str
    module: str
    make: Make
    options: dict[str, Any] = field(default_factory=dict)
    only: tuple[str, ...] = ()
    tolerance: float = 1e-5
    with_decay: float | None = None
    decays: bool = True

    @property
    def clone(self) -> Path:
        assert FOLDER is not None
        return Path(FOLDER).expanduser() / self.repository.split("/")[1]


CASES = (
    Case(
        "Muon",
        "KellerJordan/Muon",
        "857d1ad",
        "muon.py",
        lambda code, params, decay: code.SingleDeviceMuon(params, weight_decay=decay),
        {"lr_scale": "original"},
    ),
    Case(
        "Muon",
        "MoonshotAI/Moonlight",
        "c2ad5b2",
        "examples/toy_train.py",
        lambda code, params, decay: code.Muon(muon_params=params, wd=decay),
        only=("zeropower_via_newtonschulz5", "Muon"),
    ),
    Case(
        "Muon",
        "microsoft/dion",
        "0a059a4",
        "dion/muon.py",
        lambda code, params, decay: code.Muon(
            params, weight_decay=decay, nesterov=True, adjust_lr="rms_norm", newton_schulz_func=polar_factor
        ),
        {"method": "svd"},  # their iterations have coefficients of their own
    ),
    Case(
        "NorMuon",
        "zichongli5/NorMuon",
        "d45c9a4",
        "normuon.py",
        lambda code, params, decay: code.SingleDeviceNorMuon(params, weight_decay=decay),
        {"norm": "preserve", "lr_scale": "original"},
    ),
    Case(
        "AdaMuon",
        "Chongjie-Si/AdaMuon",
        "369f0b3",
        "gpt2/models/optimizers/adamuon.py",
        lambda code, params, decay: code.AdaMuon(params, weight_decay=decay, rank=0, world_size=1),
    ),
    *(
        Case(
            rule,
            "minxin-zhg/namo",
            "a3f37b0",
            "src/namo.py",
            lambda code, params, decay, theirs=theirs, ahead=ahead: getattr(code, theirs)(
                muon_params=params, wd=decay, nesterov=ahead
            ),
            {"nesterov": ahead},
        )
        for rule, theirs in (("NAMO", "NAMO"), ("NAMOD", "NAMO_D"))
        for ahead in (True, False)
    ),
    *(
        Case(
            rule,
            "jingru-lee/Variance-Adaptive-Muon",
            "75f78ad",
            f"NanoGPT/gpt2/models/optimizers/{theirs.lower()}.py",
            lambda code, params, decay, theirs=theirs: getattr(code, theirs)(
                params, weight_decay=decay, rank=0, world_size=1
            ),
        )
        for rule, theirs in (("MuonNSR", "Muon_NSR"), ("MuonVS", "Muon_VS"))
    ),
    *(
        # Their default of 2 iterations is not our ``steps=2``, which starts from another bound: both converge here.
        Case(
            "PolarGrad",
            "timlautk/polargrad",
            "79f3c6f",
            "polar_grad.py",
            lambda code, params, decay, first=order == "polar_first": code.PolarGrad(
                params, weight_decay=decay, polar_first=first, inner_steps=10
            ),
            {"order": order},
        )
        for order in ("momentum_first", "polar_first")
    ),
    *(
        # Their 5 power iterations, from ones at each step, do not converge: both get as many as it takes. A search that
        # is content with anything is none: MuonSphere.
        Case(
            "SpectralSphere",
            "Unakar/Spectral-Sphere-Optimizer",
            "304d7a4",
            "sso.py",
            lambda code, params, decay, tolerance=1e-6 if search else 1e9: code.SSO(
                params, weight_decay=decay, power_iter_steps=500, solver_tol=tolerance
            ),
            {"lambda_search": search, "power_iterations": 500, "tolerance": 1e-6},
        )
        for search in (True, False)
    ),
    Case(
        "Conda",
        "jie040109/Conda",
        "449af71",
        "conda_torch/conda.py",
        lambda code, params, decay: code.Conda(
            [{"params": params, "update_proj_gap": 4, "scale": 0.25, "proj_type": "std"}],
            betas=(0.9, 0.99),
            weight_decay=decay,
            no_deprecation_warning=True,
        ),
        {"update_every": 4},
        with_decay=5e-3,  # they decay after the step and not before: a difference of lr * decay
    ),
    Case(
        "Muown",
        "kcc-lion/muown",
        "3bd0c05",
        "optim/muown.py",
        lambda code, params, decay: code.Muown(params, weight_decay=decay),
        only=(
            "zeropower_via_newtonschulz5_torch",
            "zeropower_via_svd",
            "zeropower_via_newtonschulz5",
            "ZEROPOWER_BACKENDS",
            "_wn_pre_ns",
            "_wn_recompose",
            "Muown",
        ),
    ),
    Case(
        "MuonHyperball",
        "KellerJordan/modded-nanogpt",
        "f411b3d",
        "records/track_3_optimization/results/20260430_muonh/train_gpt_simple_muonh.py",
        lambda code, params, decay: code.MuonH(params),
        {"method": "svd"},  # their 12 iterations converge
        only=("zeropower_via_newtonschulz5", "muon_update", "scale_invariant_update_", "MuonH"),
        decays=False,
    ),
    Case(
        "Dion2",
        "microsoft/dion",
        "0a059a4",
        "dion/dion2.py",
        lambda code, params, decay: code.Dion2(
            params, weight_decay=decay, adjust_lr="rms_norm", newton_schulz_func=polar_factor
        ),
        {"method": "svd"},
    ),
)
WITHOUT_CODE = {
    "REG": "a reconstruction: the authors have published none",
    "SinkGD": "the authors have published none",
    "SWAN": "the authors have published none",
    "SpecMuon": "the authors have published none",
}


def test_every_rule_has_a_case_or_a_reason() -> None:
    assert {case.rule for case in CASES} | WITHOUT_CODE.keys() == REFERENCES.keys()


@pytest.mark.skipif(FOLDER is None, reason="LIGHTNING_MUON_AUTHORS names no folder of clones")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.rule}-{case.repository}")
def test_moves_as_the_authors_code_does(case: Case) -> None:
    if not (case.clone / case.module).is_file():
        pytest.skip(f"no {case.module} in {case.clone}: git clone https://github.com/{case.repository}")
    for name, shape in SHAPES.items():
        for decay in (0.0, 0.1) if case.decays else (0.0,):
            start, grads = matrices(shape)
            with authors_code(case) as code:
                theirs = start - run_theirs(case, code, decay, start, grads)
            ours = start - run_ours(case, decay, start, grads)
            allowed = case.tolerance if decay == 0.0 else case.with_decay or case.tolerance
            assert relative(ours, theirs) < allowed, f"{name}, weight decay {decay}"


def matrices(shape: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return 0.3 * torch.randn(shape, generator=generator), [torch.randn(shape, generator=generator) for _ in LRS]


def run_theirs(case: Case, code: Any, decay: float, start: Tensor, grads: list[Tensor]) -> Tensor:
    """The weights at the end. A batch is so many parameters, because most of their code takes matrices only."""
    m, n = start.shape[-2:]
    params = [nn.Parameter(matrix.clone()) for matrix in start.reshape(-1, m, n)]
    steps(case.make(code, params, decay), params, [grad.reshape(-1, m, n) for grad in grads])
    return torch.stack([param.detach() for param in params]).reshape(start.shape)


def run_ours(case: Case, decay: float, start: Tensor, grads: list[Tensor]) -> Tensor:
    param = nn.Parameter(start.clone())
    group = {"params": [param], "layouts": [MatrixLayout(batch_dims=start.ndim - 2)]}
    options = {"weight_decay": decay, **case.options}
    if case.rule != "Conda":
        options["orthogonalize_dtype"] = "float32"
    steps(rule_class(case.rule)([group], **options), [param], [grad[None] for grad in grads])
    return param.detach()


def steps(optimizer: Optimizer, params: Params, grads: list[Tensor]) -> None:
    for lr, step_grads in zip(LRS, grads, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for param, grad in zip(params, step_grads, strict=True):
            param.grad = grad.clone()  # some of their steps write into it
        with torch.no_grad():
            optimizer.step()


# ---- their code


@contextmanager
def authors_code(case: Case) -> Iterator[Any]:
    """The module of a case, in float32; what it imports while it runs comes from the clone too."""
    file = case.clone / case.module
    folder = file.parent
    while (folder / "__init__.py").is_file():
        folder = folder.parent
    finder = _CloneFinder(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function=None, **_: function or (lambda decorated: decorated))
        patch.setattr(torch.distributed, "get_world_size", lambda group=None: 1)
        patch.setattr(torch.distributed, "get_rank", lambda group=None: 0)
        patch.setattr(torch.distributed, "all_gather", lambda gathered, mine, **_: gathered[0].copy_(mine))
        patch.setattr(torch.distributed, "all_gather_into_tensor", _gather_into)
        patch.setattr(sys, "meta_path", [finder, *sys.meta_path])
        before = set(sys.modules)
        try:
            if case.only:
                yield _definitions(file, case.only)
            else:
                yield importlib.import_module(".".join(file.relative_to(folder).with_suffix("").parts))
        except ModuleNotFoundError as error:
            pytest.skip(f"the code in {case.clone} needs {error.name}")
        finally:
            for name in set(sys.modules) - before:
                if isinstance(getattr(sys.modules[name], "__loader__", None), _Float32Loader):
                    del sys.modules[name]


def _in_float32(source: str) -> str:
    for old, new in ((".bfloat16()", ".float()"), ("torch.bfloat16", "torch.float32"), ('"cuda"', '"cpu"')):
        source = source.replace(old, new)
    return source


class _Float32Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> Any:
        path = self.get_filename(fullname)
        return compile(_in_float32(Path(path).read_text(encoding="utf-8")), path, "exec")


class _CloneFinder:
    """Finds what lies in a folder, before anything that is installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> Any:
        for entry in path or [str(self.folder)]:
            if Path(entry).is_relative_to(self.folder):
                found = importlib.machinery.FileFinder(entry, (_Float32Loader, [".py"])).find_spec(name)
                if found is not None and found.loader is not None:
                    return found
        return None


def _definitions(file: Path, names: Sequence[str]) -> ModuleType:
    """Some classes, functions and constants of a file, with what it imports of torch and the standard library."""
    tree = ast.parse(_in_float32(file.read_text(encoding="utf-8")), str(file))
    tree.body = [node for node in tree.body if _is_wanted(node, names)]
    module = ModuleType(file.stem)
    exec(compile(tree, str(file), "exec"), module.__dict__)
    return module


def _is_wanted(node: ast.stmt, names: Sequence[str]) -> bool:
    if isinstance(node, ast.Import):
        roots = {alias.name.split(".")[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
        roots = {(node.module or "").split(".")[0]}
    elif isinstance(node, ast.Assign):
        return any(isinstance(target, ast.Name) and target.id in names for target in node.targets)
    else:
        return getattr(node, "name", None) in names
    return roots <= {"torch", *sys.stdlib_module_names}


def _gather_into(gathered: Tensor, mine: Tensor, **_: Any) -> Any:
    gathered.view(-1).copy_(mine)
    return SimpleNamespace(wait=lambda: None)
