"""Structural time series: parts that add up, ``Level() + Seasonal(12) + ...``, for ``models.structural``.

They move by steps: the length of a time gap does not enter. Parts in continuous time (``dynamics.Matern``,
``dynamics.IntegratedWiener``, ``dynamics.HarmonicOscillator``) can be added to them and take irregular times.
"""

from pyro_ssm.dynamics.structural.aggregate import Aggregate, period_column
from pyro_ssm.dynamics.structural.aggregation import Aggregated, Aggregation, RunInInitial
from pyro_ssm.dynamics.structural.autoregression import AR, ARMA, ParallelAR, from_partial, to_partial
from pyro_ssm.dynamics.structural.cycle import Cycle
from pyro_ssm.dynamics.structural.design import Design, sum_design
from pyro_ssm.dynamics.structural.irregular import Irregular
from pyro_ssm.dynamics.structural.level import Level
from pyro_ssm.dynamics.structural.regression import Regression
from pyro_ssm.dynamics.structural.seasonal import Seasonal
from pyro_ssm.dynamics.structural.trend import Trend

__all__ = [
    "AR",
    "ARMA",
    "Aggregate",
    "Aggregated",
    "Aggregation",
    "Cycle",
    "Design",
    "Irregular",
    "Level",
    "ParallelAR",
    "Regression",
    "RunInInitial",
    "Seasonal",
    "Trend",
    "from_partial",
    "period_column",
    "sum_design",
    "to_partial",
]
