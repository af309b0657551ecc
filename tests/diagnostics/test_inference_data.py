"""What ArviZ does with it: the installed one, and ArviZ 1.x in an environment of its own, without torch."""

import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.nn import PyroSample

from pyro_ssm.diagnostics import to_datasets, to_inference_data, wrap
from pyro_ssm.predict import forecast
from tests.diagnostics.test_datasets import DATES, some_data
from tests.predict.gaussian import gaussian_model

ROOT = Path(__file__).parents[2]
SEAM = Path(wrap.__file__)

# Runs with the interpreter of the other environment: folder of saved groups, file of the seam, file to write.
SCRIPT = """
import importlib.util, pathlib, sys
import arviz as az, xarray as xr
folder, seam, target = map(pathlib.Path, sys.argv[1:])
spec = importlib.util.spec_from_file_location("seam", seam)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "torch" not in sys.modules and "pyro" not in sys.modules
groups = {path.stem: xr.load_dataset(path) for path in folder.glob("*.nc")}
idata = module.wrap(groups)
assert isinstance(idata, xr.DataTree), type(idata)
assert set(idata.children) == set(groups)
for name, group in groups.items():
    xr.testing.assert_identical(idata[name].to_dataset(), group)
summary = az.summary(idata, var_names=["transition.rate", "z"])
assert len(summary) == 1 + 2 * 4 * 2, summary
loo = az.loo(idata)
idata.to_netcdf(target)
print(az.__version__, len(summary), repr(float(getattr(loo, "elpd", getattr(loo, "elpd_loo", None)))))
"""


def some_groups():
    model, data = gaussian_model(), some_data((2,), coords={"time": DATES, "series": ["a", "b"]})
    model.transition.rate = PyroSample(dist.LogNormal(torch.zeros((), dtype=torch.float64), 0.5))
    rates = torch.rand(2, 50).double() + 0.2
    drawn = forecast(model, {"transition.rate": rates}, data, [5.0, 6.0])
    return model, data, {"transition.rate": rates}, drawn


@pytest.fixture
def arviz():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz

        yield arviz


def test_the_call_of_the_installed_arviz(arviz, tmp_path):
    model, data, posterior, drawn = some_groups()
    torch.manual_seed(1)
    idata = to_inference_data(posterior, model=model, data=data, forecast=drawn, log_likelihood="one_step")
    torch.manual_seed(1)
    groups = to_datasets(posterior, model=model, data=data, forecast=drawn, log_likelihood="one_step")
    assert type(idata).__name__ == ("InferenceData" if arviz.__version__.startswith("0.") else "DataTree")
    for name, group in groups.items():
        found = idata[name]
        xr.testing.assert_identical(found if isinstance(found, xr.Dataset) else found.to_dataset(), group)
    assert len(arviz.summary(idata, var_names=["transition.rate", "z"])) == 1 + 2 * 4 * 2
    loo = arviz.loo(idata)
    assert np.isfinite(float(loo.elpd_loo if hasattr(loo, "elpd_loo") else loo.elpd))
    idata.to_netcdf(str(tmp_path / "idata.nc"))
    saved = arviz.from_netcdf(str(tmp_path / "idata.nc"))
    assert (saved["posterior"]["z"].values == groups["posterior"]["z"].values).all()
    assert (saved["predictions"]["time"].values == groups["predictions"]["time"].values).all()


def test_loo_of_conditional_terms_is_finite(arviz):
    model, data, posterior, _ = some_groups()
    idata = to_inference_data(posterior, model=model, data=data)
    assert np.isfinite(float(arviz.loo(idata, pointwise=False).iloc[0]))


def test_the_seam_needs_neither_torch_nor_pyro():
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('seam', {str(SEAM)!r})\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "print([name for name in ('torch', 'pyro', 'arviz') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_without_arviz_the_error_names_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match="pip install arviz.*to_datasets"):
        wrap.wrap({})


def arviz1_python():
    """The interpreter of an environment with ArviZ 1.x, h5netcdf and h5py; ``make arviz-next`` builds one."""
    given = os.environ.get("PYRO_SSM_ARVIZ1_PYTHON")
    found = Path(given) if given else ROOT / ".venv-arviz1" / "bin" / "python"
    if not found.exists():
        pytest.skip(f"needs ArviZ 1.x in its own environment: {found} is not there; run `make arviz-next`")
    return found


def test_arviz_1(arviz, tmp_path):
    python = arviz1_python()
    if importlib.util.find_spec("h5netcdf") is None:
        pytest.skip("needs h5netcdf to save arrays")
    model, data, posterior, drawn = some_groups()
    groups = to_datasets(posterior, model=model, data=data, forecast=drawn)
    folder, target = tmp_path / "groups", tmp_path / "idata.nc"
    folder.mkdir()
    for name, group in groups.items():
        group.to_netcdf(folder / f"{name}.nc", engine="h5netcdf")
    script = [str(python), "-W", "ignore", "-c", SCRIPT, str(folder), str(SEAM), str(target)]
    result = subprocess.run(script, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    version, rows, elpd = result.stdout.split()
    assert int(version.split(".")[0]) >= 1
    ours = wrap.wrap(groups)
    assert np.isclose(float(elpd), float(arviz.loo(ours).iloc[0]), rtol=1e-6)
    back = arviz.from_netcdf(str(target))  # written by one, read by the other
    assert (back["posterior"]["z"].values == groups["posterior"]["z"].values).all()
