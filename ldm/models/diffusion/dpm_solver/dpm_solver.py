"""DPM-Solver and DPM-Solver++ in continuous time (Lu et al. 2022, arXiv:2206.00927 and arXiv:2211.01095).

The public interface for research code; `DPMSolverSampler` and the samplers in `samplers/dpmpp.py` are what scripts use.
Time t runs from 0 (data) to `noise_schedule.T` (noise). With x_t = alpha_t x_0 + sigma_t eps and
lambda_t = log(alpha_t / sigma_t), a step from s to t of length h = lambda_t - lambda_s for a model m of eps or x_0 is

    x_t = a x_s - c (phi_1 m + phi_2 h m' + phi_3 h^2 m'')

where a = alpha_t / alpha_s, c = sigma_t, z = h for eps; a = sigma_t / sigma_s, c = alpha_t, z = -h for x_0; and
phi_1 = e^z - 1, phi_2 = phi_1 / z - 1, phi_3 = phi_2 / z - 1 / 2. Derivatives are finite differences in lambda.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.models.diffusion.guidance import Condition, join_conditions
from ldm.models.diffusion.schedules import FEW_STEPS
from ldm.modules.diffusionmodules.schedule import eps_and_x0

COSINE_S = 0.008  # Nichol and Dhariwal 2021
COSINE_T = 0.9946  # where the cosine schedule is still numerically stable
PERCENTILE = 0.995  # of dynamic thresholding (Saharia et al. 2022)
PARAMETERIZATIONS = {"noise": "eps", "x_start": "x0", "v": "v"}

ModelFn = Callable[[Tensor, Tensor], Tensor]


def expand_dims(v: Tensor, dims: int) -> Tensor:
    """v (B,) as (B, 1, ..., 1) with `dims` dimensions."""
    return v.reshape(-1, *(1,) * (dims - 1))


def interpolate_fn(x: Tensor, xp: Tensor, yp: Tensor) -> Tensor:
    """Piecewise linear interpolation of x (N, C) on ascending xp (C, K) and yp (C, K); linear beyond the ends."""
    right = torch.searchsorted(xp, x.T.contiguous()).clamp(1, xp.shape[1] - 1)  # (C, N)
    x0, x1 = xp.gather(1, right - 1), xp.gather(1, right)
    y0, y1 = yp.gather(1, right - 1), yp.gather(1, right)
    return (y0 + (x.T - x0) * (y1 - y0) / (x1 - x0)).T


class NoiseScheduleVP:
    """A variance-preserving noise schedule in continuous time.

    Args:
        schedule: "discrete" (given betas or alphas_cumprod (N,), where index i is at t = (i + 1) / N), "linear" (in
            beta, from continuous_beta_0 to continuous_beta_1), or "cosine".
    """

    def __init__(
        self,
        schedule: str = "discrete",
        betas: Tensor | None = None,
        alphas_cumprod: Tensor | None = None,
        continuous_beta_0: float = 0.1,
        continuous_beta_1: float = 20.0,
    ) -> None:
        if schedule not in ("discrete", "linear", "cosine"):
            raise ValueError(f"schedule {schedule!r} is not one of discrete, linear, cosine")
        self.schedule = schedule
        self.total_N, self.T = 1000, COSINE_T if schedule == "cosine" else 1.0
        self.beta_0, self.beta_1 = continuous_beta_0, continuous_beta_1
        if schedule == "discrete":
            if betas is not None:
                log_alphas = 0.5 * torch.log(1 - betas).cumsum(dim=0)
            elif alphas_cumprod is not None:
                log_alphas = 0.5 * torch.log(alphas_cumprod)
            else:
                raise ValueError("a discrete schedule needs betas or alphas_cumprod")
            self.total_N = len(log_alphas)
            self.t_array = torch.linspace(0, 1, self.total_N + 1, dtype=log_alphas.dtype)[1:].reshape(1, -1)
            self.log_alpha_array = log_alphas.reshape(1, -1)

    def marginal_log_mean_coeff(self, t: Tensor) -> Tensor:
        """log alpha_t for t (B,)."""
        if self.schedule == "linear":
            return -0.25 * t**2 * (self.beta_1 - self.beta_0) - 0.5 * t * self.beta_0
        if self.schedule == "cosine":
            return torch.log(torch.cos((t + COSINE_S) / (1 + COSINE_S) * math.pi / 2)) - self._cosine_log_alpha_0
        return interpolate_fn(t.reshape(-1, 1), self.t_array.to(t), self.log_alpha_array.to(t)).reshape(-1)

    def marginal_alpha(self, t: Tensor) -> Tensor:
        """alpha_t for t (B,)."""
        return torch.exp(self.marginal_log_mean_coeff(t))

    def marginal_std(self, t: Tensor) -> Tensor:
        """sigma_t for t (B,)."""
        return torch.sqrt(-torch.expm1(2 * self.marginal_log_mean_coeff(t)))

    def marginal_lambda(self, t: Tensor) -> Tensor:
        """lambda_t = log(alpha_t / sigma_t) for t (B,)."""
        log_alpha = self.marginal_log_mean_coeff(t)
        return log_alpha - 0.5 * torch.log(-torch.expm1(2 * log_alpha))

    def inverse_lambda(self, lamb: Tensor) -> Tensor:
        """The time t (B,) of lambda (B,)."""
        log_alpha = -0.5 * F.softplus(-2 * lamb)
        if self.schedule == "linear":
            root = torch.sqrt(self.beta_0**2 - 4 * (self.beta_1 - self.beta_0) * log_alpha)
            return -4 * log_alpha / (root + self.beta_0)
        if self.schedule == "cosine":
            angle = torch.arccos(torch.exp(log_alpha + self._cosine_log_alpha_0))
            return angle * 2 * (1 + COSINE_S) / math.pi - COSINE_S
        log_alphas, times = (column.to(lamb).flip(1) for column in (self.log_alpha_array, self.t_array))
        return interpolate_fn(log_alpha.reshape(-1, 1), log_alphas, times).reshape(-1)

    @property
    def _cosine_log_alpha_0(self) -> float:
        return math.log(math.cos(COSINE_S / (1 + COSINE_S) * math.pi / 2))


def model_wrapper(
    model: Callable[..., Tensor],
    noise_schedule: NoiseScheduleVP,
    model_type: str = "noise",
    model_kwargs: dict[str, Any] | None = None,
    guidance_type: str = "uncond",
    condition: Condition = None,
    unconditional_condition: Condition = None,
    guidance_scale: float = 1.0,
    classifier_fn: Callable[..., Tensor] | None = None,
    classifier_kwargs: dict[str, Any] | None = None,
) -> ModelFn:
    """A model as a function (x, t) -> eps of continuous time t (B,) or (1,).

    Args:
        model: (x, timesteps, [condition], **model_kwargs) -> output; timesteps are 0 to N - 1 of a discrete schedule.
        model_type: what it predicts: "noise", "x_start", "v" or "score".
        guidance_type: "uncond", "classifier" (Dhariwal and Nichol 2021) or "classifier-free" (Ho and Salimans 2021).
        classifier_fn: (x, timesteps, condition, **classifier_kwargs) -> log p(condition | x) (B,).
    """
    if model_type not in (*PARAMETERIZATIONS, "score"):
        raise ValueError(f"model_type {model_type!r} is not one of noise, x_start, v, score")
    if guidance_type not in ("uncond", "classifier", "classifier-free"):
        raise ValueError(f"guidance_type {guidance_type!r} is not one of uncond, classifier, classifier-free")
    model_kwargs, classifier_kwargs = model_kwargs or {}, classifier_kwargs or {}

    def timesteps(t: Tensor) -> Tensor:
        n = noise_schedule.total_N
        return (t - 1 / n) * n if noise_schedule.schedule == "discrete" else t

    def noise(x: Tensor, t: Tensor, cond: Condition = None) -> Tensor:
        conditions = () if cond is None else (cond,)
        output = model(x, timesteps(t), *conditions, **model_kwargs)
        if model_type == "score":
            return -expand_dims(noise_schedule.marginal_std(t), x.ndim) * output
        alpha_bar = expand_dims(noise_schedule.marginal_alpha(t) ** 2, x.ndim)
        return eps_and_x0(output, x, alpha_bar, PARAMETERIZATIONS[model_type])[0]

    def log_prob_gradient(x: Tensor, t: Tensor) -> Tensor:
        assert classifier_fn is not None
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            log_prob = classifier_fn(x, timesteps(t), condition, **classifier_kwargs)
            return torch.autograd.grad(log_prob.sum(), x)[0]

    def model_fn(x: Tensor, t_continuous: Tensor) -> Tensor:
        t = t_continuous.expand(x.shape[0])
        if guidance_type == "uncond":
            return noise(x, t)
        if guidance_type == "classifier":
            sigma = expand_dims(noise_schedule.marginal_std(t), x.ndim)
            return noise(x, t) - guidance_scale * sigma * log_prob_gradient(x, t)
        if guidance_scale == 1.0 or unconditional_condition is None:
            return noise(x, t, condition)
        both = join_conditions(unconditional_condition, condition)
        uncond, cond = noise(torch.cat([x] * 2), torch.cat([t] * 2), both).chunk(2)
        return uncond + guidance_scale * (cond - uncond)

    if guidance_type == "classifier" and classifier_fn is None:
        raise ValueError("guidance_type 'classifier' needs classifier_fn")
    return model_fn


class DPM_Solver:
    """Solvers of orders 1 to 3 for the probability-flow ODE, single-step, multi-step and adaptive.

    Times s, t are (B,) or (1,). solver_type: "dpm_solver" or "taylor", two second-order rules of the papers.

    Args:
        model_fn: (x, t) -> eps, see `model_wrapper`.
        predict_x0: solve in terms of x_0 (DPM-Solver++) instead of eps (DPM-Solver).
        thresholding: clip x_0 dynamically to max_val (Saharia et al. 2022), for pixels.
    """

    def __init__(
        self,
        model_fn: ModelFn,
        noise_schedule: NoiseScheduleVP,
        predict_x0: bool = False,
        thresholding: bool = False,
        max_val: float = 1.0,
    ) -> None:
        self.model = model_fn
        self.noise_schedule = noise_schedule
        self.predict_x0 = predict_x0
        self.thresholding = thresholding
        self.max_val = max_val

    # ---- the model ----

    def noise_prediction_fn(self, x: Tensor, t: Tensor) -> Tensor:
        """The predicted eps."""
        return self.model(x, t)

    def data_prediction_fn(self, x: Tensor, t: Tensor) -> Tensor:
        """The predicted x_0."""
        eps = self.noise_prediction_fn(x, t)
        alpha, sigma = (expand_dims(f(t), x.ndim) for f in (self._alpha, self._std))
        x0 = (x - sigma * eps) / alpha
        if self.thresholding:
            bound = torch.quantile(x0.abs().flatten(1), PERCENTILE, dim=1).clamp(min=self.max_val)
            bound = expand_dims(bound, x.ndim)
            x0 = x0.clamp(-bound, bound) * (self.max_val / bound)
        return x0

    def model_fn(self, x: Tensor, t: Tensor) -> Tensor:
        """What the solver integrates: x_0 if `predict_x0`, else eps."""
        return self.data_prediction_fn(x, t) if self.predict_x0 else self.noise_prediction_fn(x, t)

    def denoise_to_zero_fn(self, x: Tensor, s: Tensor) -> Tensor:
        """The last step, to clean data: the predicted x_0."""
        return self.data_prediction_fn(x, s)

    def _alpha(self, t: Tensor) -> Tensor:
        return self.noise_schedule.marginal_alpha(t)

    def _std(self, t: Tensor) -> Tensor:
        return self.noise_schedule.marginal_std(t)

    def _lambda(self, t: Tensor) -> Tensor:
        return self.noise_schedule.marginal_lambda(t)

    # ---- time steps ----

    def get_time_steps(self, skip_type: str, t_T: float, t_0: float, N: int, device: Any) -> Tensor:
        """N + 1 times from t_T to t_0, even in "logSNR", in time ("time_uniform") or its root ("time_quadratic")."""
        if skip_type == "time_uniform":
            return torch.linspace(t_T, t_0, N + 1, device=device)
        if skip_type == "time_quadratic":
            return torch.linspace(t_T**0.5, t_0**0.5, N + 1, device=device) ** 2
        if skip_type != "logSNR":
            raise ValueError(f"skip_type {skip_type!r} is not one of logSNR, time_uniform, time_quadratic")
        start, end = (float(self._lambda(torch.tensor([t]))) for t in (t_T, t_0))
        return self.noise_schedule.inverse_lambda(torch.linspace(start, end, N + 1, device=device))

    def get_orders_and_timesteps_for_singlestep_solver(
        self, steps: int, order: int, skip_type: str, t_T: float, t_0: float, device: Any
    ) -> tuple[Tensor, list[int]]:
        """(times, orders) of single-step rules with `steps` evaluations in all, lower orders last."""
        _check_order(order)
        full, rest = divmod(steps, order)
        orders = [order] * full + ([rest] if rest else [])
        if order == 3 and rest == 0:  # end in lower orders
            orders[-1:] = [2, 1]
        if skip_type == "logSNR":
            return self.get_time_steps(skip_type, t_T, t_0, len(orders), device), orders
        ends = torch.tensor([0, *orders]).cumsum(0)
        return self.get_time_steps(skip_type, t_T, t_0, steps, device)[ends.to(device)], orders

    # ---- updates ----

    def _update(
        self, x: Tensor, s: Tensor, t: Tensor, m: Tensor, d1: Any = 0, d2: Any = None, type: str = ""
    ) -> Tensor:
        """x at t by the formula above; m: the model at s, d1 = h m', d2 = h^2 m''."""
        h = expand_dims(self._lambda(t) - self._lambda(s), x.ndim)
        if self.predict_x0:
            a, c, z = self._std(t) / self._std(s), self._alpha(t), -h
        else:
            a, c, z = self._alpha(t) / self._alpha(s), self._std(t), h
        phi_1 = torch.expm1(z)
        phi_2 = phi_1 / 2 if type == "dpm_solver" else phi_1 / z - 1
        total = phi_1 * m + phi_2 * d1
        if d2 is not None:
            total = total + (phi_2 / z - 0.5) * d2
        x_t: Tensor = expand_dims(a, x.ndim) * x - expand_dims(c, x.ndim) * total
        return x_t

    def _between(self, s: Tensor, t: Tensor, r: Any) -> Tensor:
        """The time a fraction r of the step, in lambda, after s."""
        lambda_s = self._lambda(s)
        return self.noise_schedule.inverse_lambda(lambda_s + r * (self._lambda(t) - lambda_s))

    def dpm_solver_first_update(
        self, x: Tensor, s: Tensor, t: Tensor, model_s: Tensor | None = None, return_intermediate: bool = False
    ) -> Any:
        """First order, which is DDIM: x at t, and {"model_s"} if `return_intermediate`."""
        model_s = self.model_fn(x, s) if model_s is None else model_s
        x_t = self._update(x, s, t, model_s)
        return (x_t, {"model_s": model_s}) if return_intermediate else x_t

    def singlestep_dpm_solver_second_update(
        self,
        x: Tensor,
        s: Tensor,
        t: Tensor,
        r1: Any = 0.5,
        model_s: Tensor | None = None,
        return_intermediate: bool = False,
        solver_type: str = "dpm_solver",
    ) -> Any:
        """Second order with one more evaluation at fraction r1 of the step."""
        _check_solver_type(solver_type)
        r1 = 0.5 if r1 is None else r1
        model_s = self.model_fn(x, s) if model_s is None else model_s
        s1 = self._between(s, t, r1)
        model_s1 = self.model_fn(self._update(x, s, s1, model_s), s1)
        x_t = self._update(x, s, t, model_s, (model_s1 - model_s) / r1, type=solver_type)
        return (x_t, {"model_s": model_s, "model_s1": model_s1}) if return_intermediate else x_t

    def singlestep_dpm_solver_third_update(
        self,
        x: Tensor,
        s: Tensor,
        t: Tensor,
        r1: Any = 1.0 / 3.0,
        r2: Any = 2.0 / 3.0,
        model_s: Tensor | None = None,
        model_s1: Tensor | None = None,
        return_intermediate: bool = False,
        solver_type: str = "dpm_solver",
    ) -> Any:
        """Third order with two more evaluations at fractions r1 and r2 of the step."""
        _check_solver_type(solver_type)
        r1, r2 = 1 / 3 if r1 is None else r1, 2 / 3 if r2 is None else r2
        model_s = self.model_fn(x, s) if model_s is None else model_s
        s1, s2 = self._between(s, t, r1), self._between(s, t, r2)
        if model_s1 is None:
            model_s1 = self.model_fn(self._update(x, s, s1, model_s), s1)
        model_s2 = self.model_fn(self._update(x, s, s2, model_s, (model_s1 - model_s) * (r2 / r1)), s2)
        first, second = (model_s1 - model_s) / r1, (model_s2 - model_s) / r2
        if solver_type == "dpm_solver":
            x_t = self._update(x, s, t, model_s, second)
        else:
            d1, d2 = (r2 * first - r1 * second) / (r2 - r1), 2 * (second - first) / (r2 - r1)
            x_t = self._update(x, s, t, model_s, d1, d2)
        models = {"model_s": model_s, "model_s1": model_s1, "model_s2": model_s2}
        return (x_t, models) if return_intermediate else x_t

    def multistep_dpm_solver_second_update(
        self,
        x: Tensor,
        model_prev_list: Sequence[Tensor],
        t_prev_list: Sequence[Tensor],
        t: Tensor,
        solver_type: str = "dpm_solver",
    ) -> Tensor:
        """Second order from the model at the last two times, the newest last."""
        _check_solver_type(solver_type)
        (m1, m0), (t1, t0) = model_prev_list[-2:], t_prev_list[-2:]
        r0 = self._ratio(t1, t0, t0, t, x)
        return self._update(x, t0, t, m0, (m0 - m1) / r0, type=solver_type)

    def multistep_dpm_solver_third_update(
        self,
        x: Tensor,
        model_prev_list: Sequence[Tensor],
        t_prev_list: Sequence[Tensor],
        t: Tensor,
        solver_type: str = "dpm_solver",
    ) -> Tensor:
        """Third order from the model at the last three times, the newest last.

        The public code takes half of m'' for all of it, which makes its rule one of second order.
        """
        _check_solver_type(solver_type)
        (m2, m1, m0), (t2, t1, t0) = model_prev_list[-3:], t_prev_list[-3:]
        r0, r1 = self._ratio(t1, t0, t0, t, x), self._ratio(t2, t1, t0, t, x)
        first, second = (m0 - m1) / r0, (m1 - m2) / r1
        half_d2 = (first - second) / (r0 + r1)
        return self._update(x, t0, t, m0, first + r0 * half_d2, 2 * half_d2)

    def _ratio(self, a: Tensor, b: Tensor, s: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """The length in lambda of the step from a to b over that from s to t."""
        before, now = self._lambda(b) - self._lambda(a), self._lambda(t) - self._lambda(s)
        return expand_dims(before / now, x.ndim)

    def singlestep_dpm_solver_update(
        self,
        x: Tensor,
        s: Tensor,
        t: Tensor,
        order: int,
        return_intermediate: bool = False,
        solver_type: str = "dpm_solver",
        r1: Any = None,
        r2: Any = None,
    ) -> Any:
        """One single-step update of the given order, from s to t."""
        _check_order(order)
        if order == 1:
            return self.dpm_solver_first_update(x, s, t, return_intermediate=return_intermediate)
        options = {"return_intermediate": return_intermediate, "solver_type": solver_type, "r1": r1}
        if order == 2:
            return self.singlestep_dpm_solver_second_update(x, s, t, **options)
        return self.singlestep_dpm_solver_third_update(x, s, t, **options, r2=r2)

    def multistep_dpm_solver_update(
        self,
        x: Tensor,
        model_prev_list: Sequence[Tensor],
        t_prev_list: Sequence[Tensor],
        t: Tensor,
        order: int,
        solver_type: str = "dpm_solver",
    ) -> Tensor:
        """One multi-step update of the given order, to t."""
        _check_order(order)
        if order == 1:
            first: Tensor = self.dpm_solver_first_update(x, t_prev_list[-1], t, model_s=model_prev_list[-1])
            return first
        if order == 2:
            return self.multistep_dpm_solver_second_update(x, model_prev_list, t_prev_list, t, solver_type=solver_type)
        return self.multistep_dpm_solver_third_update(x, model_prev_list, t_prev_list, t, solver_type=solver_type)

    # ---- runs ----

    def dpm_solver_adaptive(
        self,
        x: Tensor,
        order: int,
        t_T: float,
        t_0: float,
        h_init: float = 0.05,
        atol: float = 0.0078,
        rtol: float = 0.05,
        theta: float = 0.9,
        t_err: float = 1e-5,
        solver_type: str = "dpm_solver",
    ) -> Tensor:
        """Steps of adaptive length, from the difference of orders `order` - 1 and `order` (2 or 3; appendix C)."""
        if order not in (2, 3):
            raise ValueError(f"the order of the adaptive solver must be 2 or 3, not {order}")
        s, end = (torch.full((1,), t, device=x.device) for t in (t_T, t_0))
        h, x_before = torch.full_like(s, h_init), x
        while float((s - end).abs()) > t_err:
            t = self.noise_schedule.inverse_lambda(self._lambda(s) + h)
            if order == 2:
                lower, models = self.dpm_solver_first_update(x, s, t, return_intermediate=True)
                higher = self.singlestep_dpm_solver_second_update(
                    x, s, t, model_s=models["model_s"], solver_type=solver_type
                )
            else:
                lower, models = self.singlestep_dpm_solver_second_update(
                    x, s, t, r1=1 / 3, return_intermediate=True, solver_type=solver_type
                )
                higher = self.singlestep_dpm_solver_third_update(x, s, t, **models, solver_type=solver_type)
            tolerance = (rtol * torch.maximum(lower.abs(), x_before.abs())).clamp(min=atol)
            error = ((higher - lower) / tolerance).square().flatten(1).mean(dim=1).sqrt().max()
            if error <= 1:
                x, x_before, s = higher, lower, t
            h = torch.minimum(theta * h * error.clamp(min=1e-10) ** (-1 / order), self._lambda(end) - self._lambda(s))
        return x

    @torch.no_grad()
    def sample(
        self,
        x: Tensor,
        steps: int = 20,
        t_start: float | None = None,
        t_end: float | None = None,
        order: int = 3,
        skip_type: str = "time_uniform",
        method: str = "singlestep",
        lower_order_final: bool = True,
        denoise_to_zero: bool = False,
        solver_type: str = "dpm_solver",
        atol: float = 0.0078,
        rtol: float = 0.05,
    ) -> Tensor:
        """Solve from noise x at t_start (default T) to t_end (default 1 / N).

        Args:
            steps: the number of model evaluations ("adaptive" uses as many as it needs).
            method: "singlestep", "singlestep_fixed" (all steps of one order), "multistep" or "adaptive".
            lower_order_final: end runs of fewer than 15 multi-step steps in lower orders, which is more stable.
            denoise_to_zero: finish with a step to clean data, one more evaluation.
        """
        t_0 = 1 / self.noise_schedule.total_N if t_end is None else t_end
        t_T = self.noise_schedule.T if t_start is None else t_start
        if method == "adaptive":
            x = self.dpm_solver_adaptive(x, order, t_T, t_0, atol=atol, rtol=rtol, solver_type=solver_type)
        elif method == "multistep":
            times = self.get_time_steps(skip_type, t_T, t_0, steps, x.device)
            x = self._multistep(x, times, order, lower_order_final and steps < FEW_STEPS, solver_type)
        elif method == "singlestep":
            choice = steps, order, skip_type, t_T, t_0, x.device
            x = self._singlestep(
                x, *self.get_orders_and_timesteps_for_singlestep_solver(*choice), skip_type, solver_type
            )
        elif method == "singlestep_fixed":
            orders = [order] * (steps // order)
            times = self.get_time_steps(skip_type, t_T, t_0, len(orders), x.device)
            x = self._singlestep(x, times, orders, skip_type, solver_type)
        else:
            raise ValueError(f"method {method!r} is not one of singlestep, singlestep_fixed, multistep, adaptive")
        if denoise_to_zero:
            x = self.denoise_to_zero_fn(x, torch.full((x.shape[0],), t_0, device=x.device))
        return x

    def _multistep(self, x: Tensor, times: Tensor, order: int, lower_final: bool, solver_type: str) -> Tensor:
        steps = len(times) - 1
        if steps < order:
            raise ValueError(f"a multi-step solver of order {order} needs at least {order} steps, not {steps}")
        models: list[Tensor] = []
        before: list[Tensor] = []
        for i, (s, t) in enumerate(zip(times[:-1], times[1:])):
            models, before = [*models[1 - order :], self.model_fn(x, s[None])], [*before[1 - order :], s[None]]
            step_order = min(order, i + 1, steps - i if lower_final else order)
            x = self.multistep_dpm_solver_update(x, models, before, t[None], step_order, solver_type=solver_type)
        return x

    def _singlestep(self, x: Tensor, times: Tensor, orders: list[int], skip_type: str, solver_type: str) -> Tensor:
        for order, s, t in zip(orders, times[:-1], times[1:]):
            inner = self._lambda(self.get_time_steps(skip_type, float(s), float(t), order, x.device))
            r1, r2 = ((float((inner[i] - inner[0]) / (inner[-1] - inner[0])) if order > i else None) for i in (1, 2))
            x = self.singlestep_dpm_solver_update(x, s[None], t[None], order, solver_type=solver_type, r1=r1, r2=r2)
        return x


def _check_order(order: int) -> None:
    if order not in (1, 2, 3):
        raise ValueError(f"the order of the solver must be 1, 2 or 3, not {order}")


def _check_solver_type(solver_type: str) -> None:
    if solver_type not in ("dpm_solver", "taylor"):
        raise ValueError(f"solver_type {solver_type!r} is not one of dpm_solver, taylor")
