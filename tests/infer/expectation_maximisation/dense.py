"""One EM step the long way: the joint Gaussian of all states and all observations, in numpy; no filter, no trick."""

import numpy as np


def joint(theta, times, u):
    """Mean and covariance of (z_1, ..., z_T, y_1, ..., y_T) of one series."""
    n, p = len(theta["A"]), len(theta["C"])
    mean = [theta["m"] + theta["M"] @ u[0]]
    P = np.zeros((times * n, times * n))
    P[:n, :n] = theta["P"]
    for k in range(times - 1):
        now, following = slice(k * n, (k + 1) * n), slice((k + 1) * n, (k + 2) * n)
        mean.append(theta["A"] @ mean[-1] + theta["B"] @ u[k] + theta["b"])
        P[following, : (k + 1) * n] = theta["A"] @ P[now, : (k + 1) * n]
        P[: (k + 1) * n, following] = P[following, : (k + 1) * n].T
        P[following, following] = theta["A"] @ P[now, now] @ theta["A"].T + theta["Q"]
    H = np.kron(np.eye(times), theta["C"])
    shift = np.concatenate([theta["D"] @ u[k] + theta["d"] for k in range(times)])
    z = np.concatenate(mean)
    noise = np.kron(np.eye(times), theta["R"])
    return np.concatenate([z, H @ z + shift]), np.block([[P, P @ H.T], [H @ P, H @ P @ H.T + noise]]), n, p


def completed(theta, y, u):
    """Mean, second moment about zero and log-likelihood of (z, y) given what is seen of y (NaN: not seen)."""
    mean, covariance, n, p = joint(theta, len(y), u)
    seen = np.concatenate([np.zeros(len(y) * n, bool), ~np.isnan(y).ravel()])
    away = y.ravel()[seen[len(y) * n :]] - mean[seen]
    inner = covariance[np.ix_(seen, seen)]
    gain = np.linalg.solve(inner, covariance[seen]).T
    mean, covariance = mean + gain @ away, covariance - gain @ covariance[seen]
    log_likelihood = -0.5 * (
        away @ np.linalg.solve(inner, away) + np.linalg.slogdet(inner)[1] + seen.sum() * np.log(2 * np.pi)
    )
    return mean, covariance + np.outer(mean, mean), log_likelihood


def regress(pairs, diagonal):
    """Weights and noise of r on x from steps (E[x x^T], E[r x^T], E[r r^T], seen rows)."""
    rows = range(len(pairs[0][1])) if diagonal else [None]
    weights, noises = [], []
    for row in rows:
        steps = [pair for pair in pairs if (pair[3].any() if row is None else pair[3][row])]
        pick = slice(None) if row is None else slice(row, row + 1)
        xx = sum(pair[0] for pair in steps)
        rx = sum(pair[1][pick] for pair in steps)
        rr = sum(pair[2][pick, pick] for pair in steps)
        W = np.linalg.solve(xx, rx.T).T
        weights.append(W)
        noises.append((rr - W @ rx.T) / len(steps))
    if diagonal:
        return np.concatenate(weights), np.diag([noise.item() for noise in noises])
    return weights[0], noises[0]


def pair(moments, r, x, known, seen):
    """E[x x^T], E[r x^T], E[r r^T] of the regressors (part x of what is uncertain, known, 1) and the response r."""
    mean, second = moments
    k = np.append(known, 1.0)
    Ex, Er = mean[x], mean[r]
    xx = np.block([[second[x, x], np.outer(Ex, k)], [np.outer(k, Ex), np.outer(k, k)]])
    return xx, np.concatenate([second[r, x], np.outer(Er, k)], 1), second[r, r], seen


def em_step(theta, series, diagonal=False):
    """New parameters, and the log-likelihood of the old ones; ``series`` is a list of (y (T, p), u (T, q))."""
    n, p = len(theta["A"]), len(theta["C"])
    first, moves, looks, total = [], [], [], 0.0
    for y, u in series:
        T = len(y)
        *moments, log_likelihood = completed(theta, y, u)
        total += log_likelihood
        z = [slice(k * n, (k + 1) * n) for k in range(T)]
        o = [slice(T * n + k * p, T * n + (k + 1) * p) for k in range(T)]

        nothing = slice(0, 0)
        first.append(pair(moments, z[0], nothing, u[0], np.ones(n, bool)))
        moves += [pair(moments, z[k + 1], z[k], u[k], np.ones(n, bool)) for k in range(T - 1)]
        looks += [pair(moments, o[k], z[k], u[k], ~np.isnan(y[k])) for k in range(T)]
    start, P = regress(first, diagonal)
    move, Q = regress(moves, diagonal)
    look, R = regress(looks, diagonal)
    new = {"M": start[:, :-1], "m": start[:, -1], "P": P, "A": move[:, :n], "B": move[:, n:-1], "b": move[:, -1]}
    new |= {"Q": Q, "C": look[:, :n], "D": look[:, n:-1], "d": look[:, -1], "R": R}
    return new, total
