"""Makes ``dynamax_em.npz``: five EM steps of dynamax on data drawn here. Run it where dynamax is installed.

One series and no inputs: dynamax 1.0.3 divides the outer product of the sum of the first states by the number of series
(NaN for four), and its M-step regresses on the input after the move where its filter uses the one before.
"""

from pathlib import Path

import numpy as np


def main():
    import jax
    import jax.numpy as jnp
    from dynamax.linear_gaussian_ssm import LinearGaussianSSM

    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(0)
    n, p, times = 2, 3, 40
    y = rng.normal(size=(times, p)).cumsum(0) + 1.0
    start = {
        "initial_mean": rng.normal(size=n),
        "initial_covariance": 1.5 * np.eye(n),
        "dynamics_weights": 0.8 * np.eye(n) + 0.1 * rng.normal(size=(n, n)),
        "dynamics_bias": 0.2 * rng.normal(size=n),
        "dynamics_covariance": np.eye(n) + 0.2,
        "emission_weights": rng.normal(size=(p, n)),
        "emission_bias": rng.normal(size=p),
        "emission_covariance": 0.5 * np.eye(p) + 0.1,
    }
    model = LinearGaussianSSM(n, p, has_dynamics_bias=True, has_emissions_bias=True)
    parameters, properties = model.initialize(jax.random.PRNGKey(0), **{k: jnp.asarray(v) for k, v in start.items()})
    fitted, trace = model.fit_em(parameters, properties, jnp.asarray(y), num_iters=5, verbose=False)
    end = {
        "initial_mean": fitted.initial.mean,
        "initial_covariance": fitted.initial.cov,
        "dynamics_weights": fitted.dynamics.weights,
        "dynamics_bias": fitted.dynamics.bias,
        "dynamics_covariance": fitted.dynamics.cov,
        "emission_weights": fitted.emissions.weights,
        "emission_bias": fitted.emissions.bias,
        "emission_covariance": fitted.emissions.cov,
    }
    np.savez_compressed(
        Path(__file__).with_name("dynamax_em.npz"),
        y=y,
        trace=np.asarray(trace),
        **{f"start_{name}": value for name, value in start.items()},
        **{f"end_{name}": np.asarray(value) for name, value in end.items()},
    )


if __name__ == "__main__":
    main()
