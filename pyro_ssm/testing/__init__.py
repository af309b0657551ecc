"""Contract tests that you subclass for components, memories, path laws and guides of your own.

A contract is a class of ``test_...`` methods. Subclass it in a test file, name the class ``Test...``, and say what is
tested; pytest finds the rest::

    class TestMyTransition(TransitionContract):
        exact_in_gaps = True

        def make_component(self):
            return MyTransition(state_dim=2)

Every test states one sentence of the contract, and its failure message repeats it. Outside pytest,
:func:`failures` runs a contract and returns what broke.
"""

from pyro_ssm.testing.checks import failures
from pyro_ssm.testing.component import ComponentContract
from pyro_ssm.testing.emission import EmissionContract
from pyro_ssm.testing.goodness import density_z_scores
from pyro_ssm.testing.guide import GuideContract
from pyro_ssm.testing.initial import InitialContract
from pyro_ssm.testing.memory import MemoryContract
from pyro_ssm.testing.path_law import PathLawContract
from pyro_ssm.testing.transition import TransitionContract

__all__ = [
    "ComponentContract",
    "EmissionContract",
    "GuideContract",
    "InitialContract",
    "MemoryContract",
    "PathLawContract",
    "TransitionContract",
    "density_z_scores",
    "failures",
]
