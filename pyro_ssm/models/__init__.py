"""State-space models as Pyro programs, and named models as short factories."""

from pyro_ssm.models.continuous import latent_ode, latent_sde, ode2vae
from pyro_ssm.models.empty import empty_path
from pyro_ssm.models.irregular import gru_d, gru_ode_bayes, neural_cde, ode_rnn, predictor
from pyro_ssm.models.laws import BoundModel, ModelParts, batch_shape, emission_law, history, observation_law, path_law
from pyro_ssm.models.mixed_frequency import mixed_frequency_factor
from pyro_ssm.models.named import dmm, srnn, vrnn
from pyro_ssm.models.plates import series_plate, site_name
from pyro_ssm.models.recurrent import MemoryNormal, MemoryNormalInitial, RecurrentMemory
from pyro_ssm.models.state_space import StateSpaceModel
from pyro_ssm.models.unobserved_components import structural

__all__ = [
    "BoundModel",
    "MemoryNormal",
    "MemoryNormalInitial",
    "ModelParts",
    "RecurrentMemory",
    "StateSpaceModel",
    "batch_shape",
    "dmm",
    "emission_law",
    "empty_path",
    "gru_d",
    "gru_ode_bayes",
    "history",
    "latent_ode",
    "latent_sde",
    "mixed_frequency_factor",
    "neural_cde",
    "observation_law",
    "ode2vae",
    "ode_rnn",
    "path_law",
    "predictor",
    "series_plate",
    "site_name",
    "srnn",
    "structural",
    "vrnn",
]
