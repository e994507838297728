"""ATESD: how much of the reference the teacher sees, fixed or chosen by a small controller.

The teacher sees the first floor(alpha * m) of the reference's m segments, and always its boxed
answer. One alpha holds for HOLD updates; it is drawn from Beta(a, b) with (a, b) = 1 +
softplus(network(state)), and REINFORCE makes those likelier after which the loss fell faster.
ATESD's text leaves the network, HOLD, the discount and the rates open: all of them are ours.

The state tells how far training is and how it goes: running means of alpha, of the loss, of the
mismatch |log p_T - log p_S|, of a probe (the student's negative log-likelihood of the references,
which is what it should come to know) and of its confidence in its own tokens.

The controller is a dictionary of tensors, so that a checkpoint holds it and --resume goes on.
"""

import math
import re

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

HOLD = 5  # ours: updates with one alpha; the falls of the loss between them reward it
DISCOUNT = 0.9  # ours: of an improvement one update later
REFERENCE = 0.01  # ours: weight of the teacher's log p of the reference in the reward
HIDDEN = 8  # ours: units of the network
RATE = 0.1  # ours: of its stochastic gradient
KEEP = 0.9  # ours: what a running mean keeps
ENTROPY_TARGET = -0.5  # ours: nats of the Beta distribution (uniform: 0)
ENTROPY_WEIGHT = 0.05  # ours
MEANS = ("alpha", "loss", "mismatch", "probe", "confidence")  # the state, beside the progress
SHAPES = ((HIDDEN, 1 + len(MEANS)), (HIDDEN,), (2, HIDDEN), (2,))

# --------------------------------------------------------------------------------------------------
# The reference, in part


def split_reference(solution: str) -> list[str]:
    """Its reasoning segments: lines, or sentences where it is one line; each with what ends it."""
    text = solution.strip()
    ends = r"\s*\n\s*" if "\n" in text else r"(?<=[.;!?])\s+"
    segments = []
    start = 0
    for match in re.finditer(ends, text):
        segments.append(text[start : match.end()])
        start = match.end()
    return [*segments, text[start:]]


def boxed(text: str) -> str:
    """The last \\boxed{...} of a text, braces matched; "" where there is none."""
    start = text.rfind("\\boxed{")
    depth = 0
    for i in range(max(start, 0), len(text) if start >= 0 else 0):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0 and text[i] == "}":
            return text[start : i + 1]
    return ""


def expose(solution: str, answer: str, share: float) -> str:
    """The first floor(share * m) of its m segments, and always the boxed answer."""
    segments = split_reference(solution)
    shown = "".join(segments[: math.floor(share * len(segments))])
    box = boxed(solution) or f"\\boxed{{{answer}}}"
    if box in shown:
        return shown.strip()
    return f"{shown.strip()} {box}".strip()


# --------------------------------------------------------------------------------------------------
# The controller


def decides(step: int) -> bool:
    """Whether a new alpha is chosen before this step."""
    return step % HOLD == 0


def new_controller(seed: int) -> dict[str, Tensor]:
    """A network that draws alpha uniformly, or nearly so, and nothing seen yet."""
    generator = torch.Generator().manual_seed(seed)
    controller = {}
    for number, shape in enumerate(SHAPES):
        controller[f"exposure/net_{number}"] = 0.1 * torch.randn(shape, generator=generator)
    controller["exposure/net_3"] -= 2.0  # 1 + softplus(-2) = 1.13: close to uniform
    controller["exposure/means"] = torch.full((len(MEANS),), math.nan)  # not seen yet
    controller["exposure/state"] = torch.zeros(1 + len(MEANS))  # at the last choice
    controller["exposure/alpha"] = torch.zeros(())
    controller["exposure/losses"] = torch.zeros(HOLD)  # under the last choice, oldest first
    controller["exposure/rewards"] = torch.zeros(2)  # running mean, mean of squares
    controller["exposure/choices"] = torch.zeros(())  # rewarded so far
    controller["exposure/step"] = torch.tensor(-1)  # of the last choice
    controller["exposure/learned"] = torch.tensor(-1)  # the last step whose means were noted
    return controller


def policy(net: list[Tensor], state: Tensor) -> torch.distributions.Beta:
    """Beta(a, b) with (a, b) = 1 + softplus(network(state))."""
    hidden = torch.tanh(net[0] @ state + net[1])
    a, b = 1 + softplus(net[2] @ hidden + net[3])
    return torch.distributions.Beta(a, b)


def network(controller: dict[str, Tensor]) -> list[Tensor]:
    return [controller[f"exposure/net_{number}"] for number in range(len(SHAPES))]


def choose(controller: dict[str, Tensor], seed: int, step: int) -> float:
    """The alpha of this step: a new one every HOLD steps, the same on every rank."""
    if decides(step) and controller["exposure/step"] != step:
        means = controller["exposure/means"].nan_to_num(0.0)
        # In hundreds of steps, and not the share of --steps, which a run may be given more of.
        state = torch.cat([means.new_tensor([min(1.0, step / 100)]), means])
        beta = policy(network(controller), state)
        alpha = np.random.default_rng([seed, step]).beta(
            beta.concentration1.item(), beta.concentration0.item()
        )
        controller["exposure/state"].copy_(state)
        controller["exposure/alpha"].fill_(alpha)
        controller["exposure/step"].fill_(step)
    return controller["exposure/alpha"].item()


def learn(controller: dict[str, Tensor], means: dict[str, float], step: int) -> None:
    """Note a step's means; after HOLD of them, move the network by the reward of its choice.

    `means` holds loss, mismatch and confidence of the step, and before a choice also probe (nats a
    token of the reference, by the student) and teacher (log p of it, by the teacher).
    """
    if not all(map(math.isfinite, means.values())):
        return  # the run is about to stop
    if controller["exposure/learned"] == step:
        return  # it is done again: the run had stopped in it, and was saved
    controller["exposure/learned"].fill_(step)
    seen = controller["exposure/means"]
    means = {"alpha": controller["exposure/alpha"].item(), **means}
    for number, name in enumerate(MEANS):
        if name in means:
            old = seen[number].item()
            first = math.isnan(old)
            seen[number] = means[name] if first else KEEP * old + (1 - KEEP) * means[name]
    losses = controller["exposure/losses"]
    losses.copy_(torch.cat([losses[1:], losses.new_tensor([means["loss"]])]))
    if decides(step + 1):
        reward = discounted_improvement(losses) + REFERENCE * means["teacher"]
        reinforce(controller, reward)


def discounted_improvement(losses: Tensor) -> float:
    """Sum over j of DISCOUNT^j * (loss before - loss after) update j, all under one choice.

    The step from the choice before is no part of it: there the loss changes because another part
    of the reference is shown, and because of what the choice before has brought.
    """
    total = 0.0
    for j, (before, after) in enumerate(zip(losses.tolist(), losses.tolist()[1:])):
        total += DISCOUNT**j * (before - after)
    return total


def reinforce(controller: dict[str, Tensor], reward: float) -> None:
    """One stochastic step: advantage * grad log p(alpha), and towards the entropy's target."""
    count = controller["exposure/choices"]
    mean, square = controller["exposure/rewards"].tolist()
    std = math.sqrt(max(0.0, square - mean**2))
    advantage = (reward - mean) / (std + 1e-8) if count > 1 else 0.0
    advantage = max(-3.0, min(3.0, advantage))  # ours: the first deviations are small by chance
    share = 1 / (count.item() + 1)
    controller["exposure/rewards"] += share * torch.tensor([reward - mean, reward**2 - square])
    count += 1

    net = [weight.clone().requires_grad_() for weight in network(controller)]
    beta = policy(net, controller["exposure/state"])
    alpha = controller["exposure/alpha"].clamp(1e-4, 1 - 1e-4)
    loss = -advantage * beta.log_prob(alpha)
    loss = loss + ENTROPY_WEIGHT * (beta.entropy() - ENTROPY_TARGET) ** 2
    gradients = torch.autograd.grad(loss, net)
    for weight, gradient in zip(network(controller), gradients):
        weight -= RATE * gradient.clamp(-1.0, 1.0)
