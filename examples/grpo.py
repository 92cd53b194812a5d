"""Train a tiny language model by GRPO, with torch's log_softmax and with pyfused.

    python examples/grpo.py                 100 steps
    python examples/grpo.py --steps 10      fewer

The reward is the fraction of tokens that are multiples of 3. A group of answers is sampled for each
prompt, and the advantage of an answer is its reward, normalised within its group. The loss is
GRPO's clipped loss with a KL penalty to the initial policy and an entropy bonus. Both policies are
trained on the same samples, so the losses of all steps must agree within rounding.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable

import torch
from common import announce, require_equal, track
from torch import Tensor, nn
from torch.nn import functional as F

import pyfused.functional

VOCABULARY, WIDTH, LENGTH = 1000, 32, 16
PROMPTS, GROUP, UPDATES = 8, 8, 2
CLIP, KL, ENTROPY = 0.2, 0.02, 1e-4
STEPS, TOLERANCE = 100, 1e-3

# Returns the log-probability of each token, and the entropy of each prediction.
LogProbs = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def by_torch(hidden: Tensor, weight: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    log_p = F.log_softmax(F.linear(hidden, weight), -1)
    return log_p.gather(1, tokens[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def by_pyfused(hidden: Tensor, weight: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    found = pyfused.functional.linear_log_probs(hidden, weight, tokens, return_entropy=True)
    return found.log_probability, found.entropy


IMPLEMENTATIONS: dict[str, LogProbs] = {"torch": by_torch, "pyfused": by_pyfused}


class Policy(nn.Module):
    """A model that predicts the next token from the last one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Returns the hidden states that predict all tokens except the first, as rows."""
        return self.mlp(self.tokens(tokens[:, :-1].flatten()))

    @torch.no_grad()
    def sample(self, prompts: Tensor, generator: torch.Generator) -> Tensor:
        """Samples sequences that begin with a prompt of one token."""
        tokens = [prompts[:, None]]
        for _ in range(LENGTH):
            p = self.head(self.mlp(self.tokens(tokens[-1][:, 0]))).softmax(-1)
            tokens.append(torch.multinomial(p, 1, generator=generator))
        return torch.cat(tokens, 1)


def reward_of(tokens: Tensor) -> Tensor:
    return (tokens[:, 1:] % 3 == 0).float().mean(1)


def advantage_of(rewards: Tensor) -> Tensor:
    """Normalises rewards by the mean and the standard deviation of each group."""
    groups = rewards.view(PROMPTS, GROUP)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-4)).flatten()


class Learner:
    """A policy, and the function that computes log-probabilities for its loss."""

    def __init__(self, policy: Policy, log_probs: LogProbs) -> None:
        self.policy, self.log_probs, self.seconds = copy.deepcopy(policy), log_probs, 0.0
        self.reference = copy.deepcopy(policy).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=1e-2)

    def learn(self, tokens: Tensor, advantage: Tensor) -> list[float]:
        """Trains on samples; returns the loss of each update."""
        labels, advantage = tokens[:, 1:].flatten(), advantage.repeat_interleave(LENGTH)
        with torch.no_grad():
            reference, old = (
                self.log_probs(model.hidden(tokens), model.head.weight, labels)[0]
                for model in (self.reference, self.policy)
            )
        losses = []
        for _ in range(UPDATES):
            self.optimizer.zero_grad()
            hidden, started = self.policy.hidden(tokens), time.perf_counter()
            log_p, entropy = self.log_probs(hidden, self.policy.head.weight, labels)
            ratio, difference = (log_p - old).exp(), reference - log_p
            clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
            gain = torch.minimum(ratio * advantage, clipped * advantage)
            divergence = difference.exp() - difference - 1  # a nonnegative estimate of KL
            loss = -(gain - KL * divergence + ENTROPY * entropy).mean()
            loss.backward()
            self.seconds += time.perf_counter() - started
            self.optimizer.step()
            losses.append(loss.item())
        return losses


def run(steps: int) -> tuple[dict[str, list[float]], list[float]]:
    """Returns the losses of each implementation, and the mean reward of each step."""
    torch.manual_seed(0)
    policy, generator = Policy(), torch.Generator().manual_seed(0)
    learners = {name: Learner(policy, log_probs) for name, log_probs in IMPLEMENTATIONS.items()}
    losses: dict[str, list[float]] = {name: [] for name in learners}
    rewards = []
    for _ in track(range(steps), "GRPO"):
        prompts = torch.randint(VOCABULARY, (PROMPTS,), generator=generator)
        sampler = learners["torch"].policy
        tokens = sampler.sample(prompts.repeat_interleave(GROUP), generator)
        reward = reward_of(tokens)
        rewards.append(reward.mean().item())
        for name, learner in learners.items():
            losses[name] += learner.learn(tokens, advantage_of(reward))
    for name, learner in learners.items():
        step_ms = 1e3 * learner.seconds / (steps * UPDATES)
        print(f"{name:<8} last loss {losses[name][-1]:.5f}, backward and loss {step_ms:.1f} ms")
    return losses, rewards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="Seconds.")
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    steps = parser.parse_args().steps
    announce(parser)
    losses, rewards = run(steps)
    tenth = max(1, len(rewards) // 10)
    first, last = (sum(some) / tenth for some in (rewards[:tenth], rewards[-tenth:]))
    print(f"reward {first:.3f} at the start, {last:.3f} at the end")
    require_equal(*losses.values(), TOLERANCE)
    print("The policy learns the same with linear_log_probs, which stores a block of logits.")
    print("It gains time and memory with large vocabularies: see examples/heads.py.")
    if not last > first:
        sys.exit("the reward has not increased")


if __name__ == "__main__":
    main()
