"""Oracles in float64: obviously right, slow, loops welcome. Imports only torch, math, itertools."""

import itertools
import math

import torch
from torch import Tensor


def pack_masks(masks: Tensor) -> Tensor:
    """Bits of (m, n) bool masks as (m, ceil(n / 64)) int64 words, one bit at a time."""
    m, n = masks.shape
    words = [[0] * ((n + 63) // 64) for _ in range(m)]
    for i, j in masks.nonzero().tolist():
        words[i][j // 64] |= 1 << (j % 64)
    signed = [[w - (1 << 64) if w >> 63 else w for w in row] for row in words]
    return torch.tensor(signed, dtype=torch.int64).reshape(m, (n + 63) // 64)


def hamming(x: Tensor, y: Tensor) -> Tensor:
    """Number of tasks in which (m, n) and (l, n) bool masks differ: (m, l) int64."""
    rows = [(row != y).sum(1) for row in x]
    return torch.stack(rows) if rows else torch.zeros(0, len(y), dtype=torch.int64)


def overlap(x: Tensor, y: Tensor) -> Tensor:
    """Number of tasks that (m, n) and (l, n) bool masks share: (m, l) int64."""
    rows = [(row & y).sum(1) for row in x]
    return torch.stack(rows) if rows else torch.zeros(0, len(y), dtype=torch.int64)


def mask_gram(
    x: Tensor, y: Tensor, hamming_table: Tensor | None, overlap_table: Tensor | None
) -> Tensor:
    """Table values of every pair of (m, n) and (l, n) bool masks: (m, l), the tables' dtype."""
    terms = []
    if hamming_table is not None:
        terms.append(hamming_table[hamming(x, y)])
    if overlap_table is not None:
        terms.append(overlap_table[overlap(x, y)])
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]


def mask_gram_matmul(
    x: Tensor, y: Tensor, hamming_table: Tensor | None, overlap_table: Tensor | None, v: Tensor
) -> Tensor:
    """The Gram matrix times (l, t) ``v``, multiplied in float64: (m, t) float64."""
    return mask_gram(x, y, hamming_table, overlap_table).double() @ v.double()


def weighted_mask_gram(x: Tensor, y: Tensor, weights: Tensor, kernel: str) -> Tensor:
    """A kernel of the weighted distances of (m, n) and (l, n) bool masks: (m, l) float64."""
    distances = torch.zeros(len(x), len(y), dtype=torch.float64)
    for k, weight in enumerate(weights.tolist()):
        differs = x[:, k, None] != y[None, :, k]
        distances[differs] += weight
    return torch.exp(-(distances if kernel == "rbf" else distances.sqrt()))


# -- regressions on subsets of tasks, and their Gram matrices ------------------------------------


def glm_hvp(
    features: Tensor,
    task_of: Tensor,
    masks: Tensor,
    curvature: Tensor | None,
    v: Tensor,
    ridge: Tensor,
) -> Tensor:
    """Hessian-vector product of every subset, one after the other: (m, k) float64."""
    features, v, ridge = features.double(), v.double(), ridge.double()
    rows = []
    for i in range(len(masks)):
        chosen = masks[i][task_of]  # (b,)
        samples = features[chosen]
        weights = torch.ones(len(samples)).double()
        if curvature is not None:
            weights = curvature[i][chosen].double()
        hessian = samples.T @ (weights[:, None] * samples) / max(1, len(samples))
        rows.append(hessian @ v[i] + ridge[i] * v[i])
    return torch.stack(rows) if rows else v.clone()


def glm_objective(
    features: Tensor, margins: Tensor, task_of: Tensor, mask: Tensor, w: Tensor, ridge: Tensor
) -> Tensor:
    """Logistic objective of one subset at one float64 w, differentiable by autograd."""
    chosen = mask[task_of]
    z = margins.double()[chosen] + features.double()[chosen] @ w
    loss = torch.nn.functional.softplus(-z, threshold=700).sum() / max(1, int(chosen.sum()))
    return loss + ridge.double() / 2 * w.square().sum()


def task_gram(
    features: Tensor, task_of: Tensor, num_tasks: int, other: Tensor, weights: Tensor
) -> Tensor:
    """Sums of ``w_i x_i y_i^T`` over the samples of each task: (n, k, t) float64."""
    out = torch.zeros(num_tasks, features.shape[1], other.shape[1], dtype=torch.float64)
    for i, a in enumerate(task_of.tolist()):
        out[a] += weights[i].double() * torch.outer(features[i].double(), other[i].double())
    return out


# -- readouts of a function given on all subsets ------------------------------------------------


def all_subsets(n: int) -> Tensor:
    """Every subset of n tasks, (2^n, n) bool; the columns of the functionals below."""
    rows = list(itertools.product([False, True], repeat=n))
    return torch.tensor(rows, dtype=torch.bool).reshape(2**n, n)


def context_weight(readout: str, others: int, size: int) -> float:
    """Probability that a given context of ``size`` out of ``others`` tasks precedes.

    Of pairs, ``"taylor"`` and ``"faithful"`` too.
    """
    if readout == "loo":
        return float(size == others)
    if readout == "banzhaf":
        return 0.5**others
    if readout == "shapley":
        return 1.0 / ((others + 1) * math.comb(others, size))
    rest = others - size  # integral of q^size (1 - q)^rest under 2 (1 - q) or 6 q (1 - q)
    if readout == "taylor":
        return 2 * math.factorial(size) * math.factorial(rest + 1) / math.factorial(others + 2)
    return 6 * math.factorial(size + 1) * math.factorial(rest + 1) / math.factorial(others + 3)


def effect_functionals(n: int, readout: str) -> Tensor:
    """Attributions as a matrix acting on the function's values: (n, 2^n)."""
    columns = []
    for members in all_subsets(n).tolist():
        column = []
        for i in range(n):
            weight = context_weight(readout, n - 1, sum(members) - members[i])
            column.append(weight if members[i] else -weight)
        columns.append(column)
    return torch.tensor(columns, dtype=torch.float64).T


def interaction_functionals(n: int, readout: str) -> Tensor:
    """Interactions of the pairs i < j, in the order of combinations: (n (n-1) / 2, 2^n)."""
    pairs = list(itertools.combinations(range(n), 2))
    columns = []
    for members in all_subsets(n).tolist():
        column = []
        for i, j in pairs:
            weight = context_weight(readout, n - 2, sum(members) - members[i] - members[j])
            column.append(weight if members[i] == members[j] else -weight)
        columns.append(column)
    return torch.tensor(columns, dtype=torch.float64).reshape(2**n, len(pairs)).T


def walsh_spectrum(values: Tensor, n: int) -> Tensor:
    """Fraction of the variance of (2^n, t) ``values`` at interaction orders 1..n: (n, t)."""
    signs = 2.0 * all_subsets(n).double() - 1
    energy = torch.zeros(n + 1, values.shape[1], dtype=torch.float64)
    for order in range(n + 1):
        for chosen in itertools.combinations(range(n), order):
            character = signs[:, list(chosen)].prod(1)
            energy[order] += (character @ values / 2**n) ** 2
    return energy[1:] / energy[1:].sum(0)


# -- regression ---------------------------------------------------------------------------------


def kernel_ridge(gram: Tensor, scores: Tensor, ridge: float, center: bool) -> tuple[Tensor, Tensor]:
    """Dual coefficients (m, t) and unpenalised intercept (t,) by one bordered dense solve."""
    m = len(gram)
    shifted = gram + ridge * torch.eye(m, dtype=torch.float64)
    if not center:
        return torch.linalg.solve(shifted, scores), torch.zeros(scores.shape[1]).double()
    one = torch.ones(m, 1, dtype=torch.float64)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    bordered = torch.cat([torch.cat([shifted, one], 1), torch.cat([one.T, zero], 1)])
    right = torch.cat([scores, torch.zeros(1, scores.shape[1], dtype=torch.float64)])
    solution = torch.linalg.solve(bordered, right)
    return solution[:m], solution[m]


def leave_one_out(gram: Tensor, scores: Tensor, ridge: float, center: bool) -> Tensor:
    """Residual of each subset under the fit to all others, (m, t): m refits."""
    m = len(gram)
    residuals = []
    for i in range(m):
        rest = [j for j in range(m) if j != i]
        dual, intercept = kernel_ridge(gram[rest][:, rest], scores[rest], ridge, center)
        residuals.append(scores[i] - gram[i, rest] @ dual - intercept)
    return torch.stack(residuals)


def posterior_variance(
    functionals: Tensor, prior: Tensor, fitted: Tensor, ridge: float, center: bool
) -> Tensor:
    """Variance of linear functionals of a Gaussian process, dense algebra on all its values.

    functionals (rows, N) act on the N values with covariance prior (N, N), plus a constant of flat
    prior if center; fitted (m,) int64 are the values observed with noise ridge. Returns (rows,).
    """
    cross = functionals @ prior[:, fitted]  # (rows, m)
    noisy = prior[fitted][:, fitted] + ridge * torch.eye(len(fitted), dtype=torch.float64)
    variance = (functionals @ prior * functionals).sum(1)
    variance = variance - (cross * torch.linalg.solve(noisy, cross.T).T).sum(1)
    if center:  # Rasmussen & Williams 2006, section 2.7, with the vague prior's limit
        one = torch.ones(len(fitted), dtype=torch.float64)
        weight = torch.linalg.solve(noisy, one)
        variance = variance + (functionals.sum(1) - cross @ weight) ** 2 / (one @ weight)
    return variance


# -- kernels on real weights --------------------------------------------------------------------


def kernel_matrix(
    name: str, x: Tensor, y: Tensor, **parameters: float | tuple[float, ...]
) -> Tensor:
    """One kernel between every row of x (m, n) and of y (l, n), pair by pair: (m, l)."""
    rows = []
    for a in x.tolist():
        rows.append([_kernel(name, a, b, **parameters) for b in y.tolist()])
    return torch.tensor(rows, dtype=torch.float64).reshape(len(x), len(y))


def _kernel(
    name: str, a: list[float], b: list[float], **parameters: float | tuple[float, ...]
) -> float:
    dot = sum(u * v for u, v in zip(a, b, strict=True))
    gamma = parameters.get("gamma", 1.0)
    if name == "linear":
        return dot
    if name == "polynomial":
        return (gamma * dot + parameters["coef0"]) ** parameters["degree"]
    if name == "anova2":
        products = [u * v for u, v in zip(a, b, strict=True)]
        pairs = sum(p * q for p, q in itertools.combinations(products, 2))
        return dot + parameters["pair_weight"] * pairs
    if name == "size":
        one, other = (_legendre(1 - 2 * sum(c) / len(c), parameters["degree"]) for c in (a, b))
        return sum(u * v for u, v in zip(one, other, strict=True)) / parameters["degree"]
    gammas = gamma if isinstance(gamma, tuple) else (gamma,) * len(a)
    apart = [(g, abs(u - v)) for g, u, v in zip(gammas, a, b, strict=True)]
    power = {
        "rbf": sum(g * d**2 for g, d in apart),
        "laplace": sum(g * d for g, d in apart),
        "exponential": math.sqrt(sum((g * d) ** 2 for g, d in apart)),
    }[name]
    missing = 2 - (sum(a) + sum(b)) / max(len(a), 1)  # in both, as shares of all tasks
    return math.exp(parameters.get("amplitude", 0.0) * missing - power)


def _legendre(x: float, degree: int) -> list[float]:
    """Legendre polynomials at x of degrees 1 to ``degree``, from their coefficients."""
    return [
        sum(math.comb(d, k) * math.comb(d + k, k) * ((x - 1) / 2) ** k for k in range(d + 1))
        for d in range(1, degree + 1)
    ]


def philox(seed, counter):
    """Philox4x32-10 of Salmon et al. 2011, on Python integers."""
    c, keys = list(counter), [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ keys[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ keys[1], a & 0xFFFFFFFF]
        keys = [(keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def projection_row(coordinate, dim, kind, seed, sparsity=1, hadamard=False):
    """Row of P for one coordinate, (dim,) float64, entry by entry from csrc/projection.h."""

    def words(index, group, replicate):
        tag = 1 << 24 | ("sbp", "rademacher", "gaussian", "sjlt").index(kind) << 16 | replicate
        return philox(seed, [index & 0xFFFFFFFF, index >> 32, group, tag])

    def negative(block, replicate, u):
        return words(block, 1 + u // 128, replicate)[u % 128 // 32] >> u % 32 & 1

    segment = dim // sparsity
    row = torch.zeros(dim, dtype=torch.float64)
    if kind == "rademacher":
        block, j = divmod(coordinate, 128)
        for r in range(dim):
            bit = words(block, r, 0)[j % 8 // 2] >> (j // 8 + 16 * (j % 2)) & 1
            row[r] = -1.0 if bit else 1.0
        return row / math.sqrt(dim)
    if kind == "gaussian":
        quad, j = divmod(coordinate, 4)
        for r in range(dim):
            radius, angle = words(quad, r, 0)[j // 2 * 2 : j // 2 * 2 + 2]
            u = ((radius >> 9) + 0.5) / 2**23
            theta = (((angle & 0x3FFFFFFF) >> 7) + 0.5) / 2**23 - 0.5 + (angle >> 30)
            turn = math.sin if j % 2 else math.cos
            row[r] = math.sqrt(-2 * math.log(u)) * turn(theta * math.pi / 2)
        return row / math.sqrt(dim)
    if kind == "sjlt":
        for t in range(sparsity):
            word = words(coordinate, t // 4, 0)[t % 4]
            row[t * segment + ((word >> 1) * segment >> 31)] = -1.0 if word & 1 else 1.0
        return row / math.sqrt(sparsity)
    length = max(2**e for e in range(5) if segment % 2**e == 0)
    block, position = divmod(coordinate, segment)
    mixed = {position: 1.0}
    if hadamard:
        run = max(2**e for e in range(13) if segment % 2**e == 0)
        sign = -1.0 if negative(block, 0xFFFF, position) else 1.0
        start, inner = position // run * run, position % run
        mixed = {
            start + u: sign * (-1.0) ** bin(inner & u).count("1") / math.sqrt(run)
            for u in range(run)
        }
    for t in range(sparsity):
        random, vectors = words(block, 0, t), segment // length
        multiplier = (random[0] * vectors >> 32) + 1
        while math.gcd(multiplier, vectors) != 1:
            multiplier = multiplier % vectors + 1
        shift, flip = random[1] * vectors >> 32, random[2] % length
        for u, value in mixed.items():
            vector = (multiplier * (u // length) + shift) % vectors
            place = t * segment + vector * length + (u % length ^ flip)
            row[place] += -value if negative(block, t, u) else value
    return row / math.sqrt(sparsity)


def softmax_hvp(logits, tangents, weights):
    """w_i (diag(p_i) - p_i p_i^T) dz_ri, row by row in float64: (b, c), (s, b, c), (b,)."""
    out = torch.zeros(tangents.shape, dtype=torch.float64)
    for i, row in enumerate(logits.double()):
        p = row.softmax(0)
        weight = 1.0 if weights is None else float(weights[i])
        for r in range(len(tangents)):
            t = tangents[r, i].double()
            out[r, i] = weight * (p * t - p * (p * t).sum())
    return out


def kriging(
    gram: Tensor,
    observed: Tensor,
    scores: Tensor,
    basis: Tensor,
    ridge: float | Tensor,
    nugget: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Universal kriging of all N points from those ``observed``, for one target, densely.

    Args:
        gram: (N, N) kernel.
        observed: (m,) int64.
        scores: (m,) of the observed points.
        basis: (N, p) functions of the trend, the constant among them.
        ridge: Variance beside the kernel's at an observed point, a number or (m,).
        nugget: How much of it, at every point, is part of what is predicted.

    Returns:
        Means (N,), covariances (N, N) and coefficients (p,).
    """
    prior = gram + nugget * torch.eye(len(gram), dtype=torch.float64)
    rest = (torch.as_tensor(ridge) - nugget) * torch.ones(len(observed), dtype=torch.float64)
    inverse = torch.linalg.inv(prior[observed][:, observed] + torch.diag(rest))
    h, cross = basis[observed], prior[:, observed]
    of_slopes = torch.linalg.inv(h.T @ inverse @ h)
    slopes = of_slopes @ h.T @ inverse @ scores
    mean = basis @ slopes + cross @ inverse @ (scores - h @ slopes)
    left = basis - cross @ inverse @ h
    covariance = prior - cross @ inverse @ cross.T + left @ of_slopes @ left.T
    return mean, covariance, slopes


def restricted_likelihood(
    gram: Tensor, scores: Tensor, basis: Tensor, ridge: float, weights: Tensor
) -> float:
    """Log-likelihood of contrasts of ``scores`` (m,) orthogonal to ``basis`` (m, p).

    At the variance that is most likely; scores of weight w have ``ridge / w``.
    """
    full = torch.linalg.qr(basis, mode="complete")[0]
    contrasts = full[:, basis.shape[1] :]  # (m, m - p)
    covariance = contrasts.T @ (gram + torch.diag(ridge / weights)) @ contrasts
    rest = contrasts.T @ scores
    variance = rest @ torch.linalg.solve(covariance, rest) / len(rest)
    law = torch.distributions.MultivariateNormal(torch.zeros_like(rest), variance * covariance)
    return float(law.log_prob(rest))
