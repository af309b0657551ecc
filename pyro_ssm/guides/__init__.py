"""Guides: approximate posteriors q(path | data) that Pyro trains and particle filters use as proposals."""

from pyro_ssm.guides.arcta import ARCTA
from pyro_ssm.guides.base import Guide
from pyro_ssm.guides.bridge import AbstractBridge, BridgeContext, Control
from pyro_ssm.guides.encoded import AbstractEncodedGuide
from pyro_ssm.guides.encoder import Context, DataEncoder
from pyro_ssm.guides.first_frames import FirstFrames, PositionVelocity, encoded_laws
from pyro_ssm.guides.gaussian_markov import GaussianMarkov
from pyro_ssm.guides.initial_state import InitialState
from pyro_ssm.guides.linear_gaussian import LinearGaussian
from pyro_ssm.guides.posterior_drift import PosteriorDrift
from pyro_ssm.guides.posterior_sde import PosteriorSDE, SDEContext
from pyro_ssm.guides.sde_matching import SDEMatching
from pyro_ssm.guides.structured import Structured
from pyro_ssm.guides.svise import SVISE

__all__ = [
    "ARCTA",
    "SVISE",
    "AbstractBridge",
    "AbstractEncodedGuide",
    "BridgeContext",
    "Context",
    "Control",
    "DataEncoder",
    "FirstFrames",
    "GaussianMarkov",
    "Guide",
    "InitialState",
    "LinearGaussian",
    "PositionVelocity",
    "PosteriorDrift",
    "PosteriorSDE",
    "SDEContext",
    "SDEMatching",
    "Structured",
    "encoded_laws",
]
