"""Objectives against closed forms: exact sums over a small policy, finite differences, and sampled optimisation."""

import math

import pytest
import torch

from cfrl.rl.policy import (
    Baseline,
    adapt_beta,
    advantages,
    clipped_surrogate,
    dpo_loss,
    floored_log_prob,
    grpo_advantage,
    held_loss,
    importance_weight,
    is_clipped,
    kl_estimate,
    kl_k3,
    kl_loss,
    preference_pairs,
    rebel_loss,
    rloo_advantage,
    shaped_reward,
    vargrad_loss,
)

GROUPS, OUTCOMES, BETA = 3, 6, 0.5


class Toy:
    """A policy over `OUTCOMES` things in each of `GROUPS` space groups, with a base policy and a reward."""

    def __init__(self, seed: int = 0) -> None:
        rng = torch.Generator().manual_seed(seed)
        shape = (GROUPS, OUTCOMES)
        self.base = torch.randn(shape, generator=rng, dtype=torch.float64).log_softmax(1)
        self.reward = torch.randn(shape, generator=rng, dtype=torch.float64)
        self.group_base = torch.randn(GROUPS, generator=rng, dtype=torch.float64).log_softmax(0)
        self.logits = self.base.clone().requires_grad_()
        self.rng = rng

    def optimum(self, beta: float = BETA) -> torch.Tensor:
        return (self.base + self.reward / beta).softmax(1)

    def log_prob(self) -> torch.Tensor:
        return self.logits.log_softmax(1)

    def objective(self, beta: float = BETA) -> torch.Tensor:
        """E[r] - beta KL, groups equally likely, by summation."""
        log_prob = self.log_prob()
        return (log_prob.exp() * (self.reward - beta * (log_prob - self.base))).sum(1).mean()

    def draw(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        group = torch.randint(GROUPS, (n,), generator=self.rng)
        probs = self.log_prob().detach().exp()[group]
        return group, torch.multinomial(probs, 1, generator=self.rng).squeeze(1)


def all_pairs() -> tuple[torch.Tensor, torch.Tensor]:
    group, outcome = torch.meshgrid(torch.arange(GROUPS), torch.arange(OUTCOMES), indexing="ij")
    return group.flatten(), outcome.flatten()


def tune(algorithm: str, kl: str, epochs: int = 2, steps: int = 250, n: int = 384) -> Toy:
    """The loop of `finetune` on the toy."""
    toy = Toy()
    optimiser = torch.optim.Adam([toy.logits], lr=0.1)
    decay = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 0.02 ** (step / steps))
    baseline = Baseline(0.8)
    for _ in range(steps):
        group, outcome = toy.draw(n)
        old, base = toy.log_prob().detach()[group, outcome], toy.base[group, outcome]
        beta = BETA if kl == "reward" else 0.0
        score = shaped_reward(toy.reward[group, outcome], old[:, None], base[:, None], beta)
        baseline.update(score, group, torch.zeros_like(group))
        advantage, _ = advantages(algorithm, score, group, torch.zeros_like(group), baseline)
        for _ in range(epochs):
            now = toy.log_prob()[group, outcome]
            loss = -clipped_surrogate(now, old, advantage, 0.2).mean()
            if algorithm == "vargrad":
                loss = vargrad_loss(advantage, now, old, BETA).mean()
            if kl == "loss":
                loss = loss + BETA * kl_loss(now, old, base).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        decay.step()
    return toy


@pytest.mark.parametrize(
    ("algorithm", "kl"),
    [
        *(("ppo", "reward"), ("ppo", "loss"), ("grpo", "reward"), ("rloo", "reward"), ("rloo", "loss")),
        ("vargrad", "reward"),
    ],
)
def test_sampled_optimisation_reaches_the_closed_form_optimum(algorithm, kl):
    toy = tune(algorithm, kl)
    total_variation = 0.5 * (toy.log_prob().detach().exp() - toy.optimum()).abs().sum(1)
    start = 0.5 * (toy.base.exp() - toy.optimum()).abs().sum(1)
    assert start.max() > 0.5  # there was something to learn
    assert total_variation.max() < 0.04


@pytest.mark.parametrize("entropy", [0.0, 0.3])
@pytest.mark.parametrize("kl", ["reward", "loss"])
def test_on_policy_gradient_is_that_of_the_objective(kl, entropy):
    """Summed over all outcomes with their probabilities, the surrogate's gradient is that of J, term by term."""
    toy = Toy(1)
    with torch.no_grad():
        toy.logits += 0.5 * torch.randn(toy.logits.shape, generator=toy.rng, dtype=torch.float64)
    group, outcome = all_pairs()
    now, base = toy.log_prob()[group, outcome], toy.base[group, outcome]
    old = now.detach()
    score = shaped_reward(
        toy.reward[group, outcome], old[:, None], base[:, None], BETA if kl == "reward" else 0.0, entropy
    )
    gain = clipped_surrogate(now, old, score - 0.7, 0.2)  # any baseline
    if kl == "loss":
        gain = gain - BETA * kl_loss(now, old, base)
    (gradient,) = torch.autograd.grad((old.exp() * gain).sum() / GROUPS, toy.logits)

    exact = toy.objective() - entropy * (toy.log_prob().exp() * toy.log_prob()).sum(1).mean()
    (expected,) = torch.autograd.grad(exact, toy.logits)
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=1e-9)


def test_naive_k3_loss_would_have_the_wrong_gradient():
    """Why `kl_loss` carries the ratio: without it the gradient is that of KL(base || policy)."""
    toy = Toy(2)
    with torch.no_grad():
        toy.logits += torch.randn(toy.logits.shape, generator=toy.rng, dtype=torch.float64)
    group, outcome = all_pairs()
    now, base = toy.log_prob()[group, outcome], toy.base[group, outcome]
    weights = now.detach().exp() / GROUPS
    (naive,) = torch.autograd.grad((weights * kl_k3(now - base)).sum(), toy.logits, retain_graph=True)
    (right,) = torch.autograd.grad((weights * kl_loss(now, now.detach(), base)).sum(), toy.logits)
    (reverse,) = torch.autograd.grad((toy.base.exp() * (toy.base - toy.log_prob())).sum() / GROUPS, toy.logits)
    torch.testing.assert_close(naive, reverse, atol=1e-12, rtol=1e-9)
    assert (naive - right).abs().max() > 0.01


@pytest.mark.parametrize("objective", ["surrogate", "kl_loss", "k3", "dpo", "rebel", "floor", "kl_estimate"])
def test_gradients_against_finite_differences(objective):
    rng = torch.Generator().manual_seed(3)
    old, base, advantage = torch.randn(3, 8, generator=rng, dtype=torch.float64)
    now = (old + 0.1 * torch.randn(8, generator=rng, dtype=torch.float64)).requires_grad_()
    functions = {
        "surrogate": lambda x: clipped_surrogate(x, old, advantage, 0.2),
        "kl_loss": lambda x: kl_loss(x, old, base),
        "k3": lambda x: kl_k3(x - base),
        "dpo": lambda x: dpo_loss(x[:4], x[4:], base[:4], base[4:], 0.3),
        "rebel": lambda x: rebel_loss(x[:4] - x[4:], advantage[:4] - advantage[4:], 0.3),
        "floor": lambda x: floored_log_prob(x, base.log_softmax(0), 0.1),
        "kl_estimate": lambda x: kl_estimate((x - base).view(4, 2)),
    }
    assert torch.autograd.gradcheck(functions[objective], (now,))


def test_clipping():
    ratio = torch.tensor([0.5, 0.9, 1.0, 1.1, 1.5] * 2, dtype=torch.float64)
    advantage = torch.tensor([1.0] * 5 + [-1.0] * 5, dtype=torch.float64)
    now, old = ratio.log().requires_grad_(), torch.zeros(10, dtype=torch.float64)
    gain = clipped_surrogate(now, old, advantage, 0.2)
    expected = [0.5, 0.9, 1.0, 1.1, 1.2, -0.8, -0.9, -1.0, -1.1, -1.5]
    torch.testing.assert_close(gain, torch.tensor(expected, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(gain.sum(), now)
    assert torch.equal(gradient == 0, is_clipped(now, old, advantage, 0.2))
    assert is_clipped(now, old, advantage, 0.2).nonzero().flatten().tolist() == [4, 5]


def test_dpo_recovers_the_optimum_from_bradley_terry_preferences():
    """Preferences with probability sigmoid(r1 - r2) make the optimum of DPO p0 exp(r / beta), exactly."""
    toy = Toy(4)
    first, second = torch.meshgrid(torch.arange(OUTCOMES), torch.arange(OUTCOMES), indexing="ij")
    preferred = torch.sigmoid(toy.reward[:, :, None] - toy.reward[:, None, :])
    optimiser = torch.optim.LBFGS([toy.logits], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        now = toy.log_prob()
        loss = dpo_loss(now[:, first], now[:, second], toy.base[:, first], toy.base[:, second], BETA)
        mean = (preferred * loss).mean()
        mean.backward()
        return mean

    optimiser.step(closure)
    torch.testing.assert_close(toy.log_prob().detach().exp(), toy.optimum(), atol=1e-5, rtol=1e-4)


def test_rebel_reaches_the_optimum_from_pairs_that_someone_else_drew():
    """Uniform pairs of each group, far from the policy's own; stochastic steps end at the optimum all the same."""
    toy = Toy(6)
    optimiser = torch.optim.Adam([toy.logits], lr=0.05)
    for _ in range(600):
        group = torch.randint(GROUPS, (32,), generator=toy.rng)
        first, second = torch.randint(OUTCOMES, (2, 32), generator=toy.rng)
        ratio, reward = toy.log_prob() - toy.base, toy.reward
        gaps = (x[group, first] - x[group, second] for x in (ratio, reward))
        optimiser.zero_grad()
        rebel_loss(*gaps, BETA).mean().backward()
        optimiser.step()
    torch.testing.assert_close(toy.log_prob().detach().exp(), toy.optimum(), atol=1e-6, rtol=1e-5)


def test_replay_weights_correct_for_the_policy_that_drew():
    """E_drawn[w A grad log policy] over a part S of all outcomes is the policy's own gradient of E[A 1_S]."""
    toy = Toy(5)
    drawn = torch.randn(toy.logits.shape, generator=toy.rng, dtype=torch.float64).log_softmax(1)
    group, outcome = all_pairs()
    best = toy.reward[group, outcome] > 0.3
    now = toy.log_prob()[group, outcome]
    advantage = toy.reward[group, outcome] - 0.1
    weight = importance_weight(now.detach(), drawn[group, outcome], limit=math.inf)
    gain = weight * clipped_surrogate(now, now.detach(), advantage, 0.2) * best
    (gradient,) = torch.autograd.grad((drawn[group, outcome].exp() * gain).sum(), toy.logits, retain_graph=True)
    (expected,) = torch.autograd.grad((now.exp() * advantage * best).sum(), toy.logits)
    torch.testing.assert_close(gradient, expected)
    assert importance_weight(now.detach(), drawn[group, outcome], limit=1.5).max() == 1.5


def test_kl_estimate_is_unbiased():
    rng = torch.Generator().manual_seed(6)
    for shift in (0.05, 0.5, 2.0):  # policy N(shift, 1) against base N(0, 1): KL = shift^2 / 2 for each factor
        x = shift + torch.randn(4000, 200, 2, generator=rng, dtype=torch.float64)
        log_ratio = 0.5 * (x**2 - (x - shift) ** 2)
        found = torch.stack([kl_estimate(sample) for sample in log_ratio])
        assert abs(float(found.mean()) - shift**2) < 5 * float(found.std()) / math.sqrt(len(found))


@pytest.mark.parametrize("leak", [0.0, 1e-6], ids=["cut off", "all but left"])
def test_kl_estimate_of_a_policy_that_has_left_a_part_of_the_base(leak):
    """All outcomes are listed; where a policy keeps 0.6 of the base, k3 would find 0.1 in place of 0.5 nats."""
    base = torch.tensor([0.3, 0.2, 0.1, 0.25, 0.15], dtype=torch.float64)
    policy = base * torch.tensor([1.0, 1.2, 0.8, leak, leak], dtype=torch.float64)
    policy = policy / policy.sum()
    exact = float(torch.special.xlogy(policy, policy / base).sum())
    d = (policy / base).log()[torch.multinomial(policy, 128, True, generator=torch.Generator().manual_seed(0))]
    assert float(kl_estimate(d[:, None])) == pytest.approx(exact, abs=0.06)
    assert float(kl_k3(d).mean()) < 0.3 * exact


def test_one_factor_alone_keeps_the_mean_of_its_ratio():
    """Two dependent steps: exp(-d) of each factor has mean one, so that per-factor estimates may be added."""
    toy = Toy(7)
    marginal, base_marginal = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.5, 0.3, 0.2])
    probs = (marginal[:, None] * toy.optimum()).double()
    first = (marginal.log() - base_marginal.log()).double()[:, None].expand(3, OUTCOMES)
    second = toy.optimum().log() - toy.base
    for d in (first, second, first + second):
        assert float((probs * torch.exp(-d)).sum()) == pytest.approx(1)
        assert float((probs * kl_k3(d)).sum()) == pytest.approx(float((probs * d).sum()))


def test_leave_one_out_advantage():
    score = torch.tensor([1.0, 4.0, 7.0, -2.0], dtype=torch.float64)
    expected = [s - (score.sum() - s) / 3 for s in score]
    torch.testing.assert_close(rloo_advantage(score), torch.stack(expected))
    assert rloo_advantage(score[:1]).tolist() == [0.0]


def test_group_advantage_standardises_within_groups_and_falls_back_to_the_batch():
    score = torch.tensor([1.0, 5.0, 3.0, 10.0, -4.0, 2.0], dtype=torch.float64)
    group = torch.tensor([225, 7, 225, 62, 7, 225])
    advantage = grpo_advantage(score, group)
    for label in (225, 7):
        members = score[group == label]
        expected = (members - members.mean()) / members.std()
        torch.testing.assert_close(advantage[group == label], expected, atol=1e-5, rtol=1e-5)
    alone = (score[3] - score.mean()) / score.std()
    torch.testing.assert_close(advantage[3], alone, atol=1e-5, rtol=1e-5)
    assert grpo_advantage(score[:1], group[:1]).tolist() == [0.0]
    assert torch.equal(grpo_advantage(torch.ones(4), torch.tensor([1, 1, 2, 3])), torch.zeros(4))  # all alike


def test_learned_space_groups_reach_their_own_optimum():
    """The joint policy over (G, C) has the optimum p0(G) Z(G) over groups, with every algorithm's second advantage."""
    toy = Toy(8)
    log_z = torch.logsumexp(toy.base + toy.reward / BETA, 1)
    expected = (toy.group_base + log_z).softmax(0)
    for algorithm in ("ppo", "grpo", "rloo"):
        logits = toy.group_base.clone().requires_grad_()
        optimiser = torch.optim.Adam([logits], lr=0.05)
        decay = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 0.02 ** (step / 300))
        best, baseline = toy.optimum(), Baseline(0.8)
        for _ in range(300):
            now = logits.log_softmax(0)
            group = torch.multinomial(now.detach().exp(), 384, replacement=True, generator=toy.rng)
            outcome = torch.multinomial(best[group], 1, generator=toy.rng).squeeze(1)
            log_prob = torch.stack([best.log()[group, outcome], now.detach()[group]], 1)
            log_prob_base = torch.stack([toy.base[group, outcome], toy.group_base[group]], 1)
            score = shaped_reward(toy.reward[group, outcome], log_prob, log_prob_base, BETA)
            baseline.update(score, group, torch.zeros_like(group))
            _, advantage = advantages(algorithm, score, group, torch.zeros_like(group), baseline)
            loss = -clipped_surrogate(now[group], now.detach()[group], advantage, 0.2).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            decay.step()
        assert 0.5 * float((logits.detach().softmax(0) - expected).abs().sum()) < 0.04, algorithm


def test_a_regression_learns_the_optimum_from_crystals_of_another_policy():
    """What was drawn evenly, once, will do: at the optimum the loss of every one of them is zero."""
    toy = Toy()
    group, outcome = (x.flatten() for x in torch.meshgrid(torch.arange(GROUPS), torch.arange(OUTCOMES), indexing="ij"))
    group, outcome = group.repeat(200), outcome.repeat(200)
    reward, base = toy.reward[group, outcome], toy.base[group, outcome]
    optimiser = torch.optim.Adam([toy.logits], lr=0.05)
    baseline = Baseline(0.0)
    for _ in range(400):
        now = toy.log_prob()[group, outcome]
        old = now.detach()
        score = shaped_reward(reward, old[:, None], base[:, None], BETA)
        baseline.update(score, group, torch.zeros_like(group))
        advantage, _ = advantages("vargrad", score, group, torch.zeros_like(group), baseline)
        loss = vargrad_loss(advantage, now, old, BETA).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(loss) < 1e-4
    torch.testing.assert_close(toy.log_prob().detach().exp(), toy.optimum(), atol=0.01, rtol=0)


def test_gradient_of_the_regression_is_the_policy_gradient_where_the_policy_has_drawn():
    toy = Toy(3)
    now = toy.log_prob()[0]
    score = shaped_reward(toy.reward[0], now.detach()[:, None], toy.base[0][:, None], BETA)
    advantage = score - float((now.detach().exp() * score).sum())
    weight = now.detach().exp()  # of each outcome among many draws
    by_regression = torch.autograd.grad((weight * vargrad_loss(advantage, now, now.detach(), BETA)).sum(), toy.logits)[
        0
    ]
    now = toy.log_prob()[0]
    objective = (now.exp() * (toy.reward[0] - BETA * (now - toy.base[0]))).sum()
    torch.testing.assert_close(by_regression, -torch.autograd.grad(objective, toy.logits)[0])


def test_what_is_held_costs_the_kl():
    base = torch.randn(5, generator=torch.Generator().manual_seed(2), dtype=torch.float64).log_softmax(0)
    near = (base + 1e-3 * torch.randn(5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).log_softmax(
        0
    )
    cost = (near.exp() * held_loss((near - base)[:, None], 2.0)).sum()
    assert float(cost) == pytest.approx(2.0 * float((near.exp() * (near - base)).sum()), rel=1e-2)


def test_baseline_is_the_recent_mean_of_a_kind_and_of_what_it_leaves_in_a_space_group():
    baseline = Baseline(0.9, cells=3)
    rng = torch.Generator().manual_seed(4)
    groups = torch.tensor([2, 62, 225]).repeat_interleave(400)
    kinds = torch.tensor([0, 1]).repeat(600)
    level = groups.double() / 100 - 3.0 * kinds
    for _ in range(60):
        noise = 0.1 * torch.randn(len(level), generator=rng, dtype=torch.float64)
        baseline.update(level + noise, groups, kinds)
    asked = torch.tensor([2, 62, 225])
    for kind in (0, 1):
        found = baseline.of(asked, torch.full((3,), kind))
        torch.testing.assert_close(found, asked.double() / 100 - 3.0 * kind, atol=0.03, rtol=0)
    assert baseline.mean == pytest.approx(float(level.mean()), abs=0.02)
    unseen = baseline.of(torch.tensor([99]), torch.tensor([2]))
    assert float(unseen) == pytest.approx(baseline.mean)  # neither kind nor group: the mean of all
    again = Baseline(0.9, cells=3)
    again.load_state_dict(baseline.state_dict())
    assert torch.equal(again.of(asked, torch.zeros_like(asked)), baseline.of(asked, torch.zeros_like(asked)))


def test_floor_holds_under_any_logits():
    base = torch.randn(9, generator=torch.Generator().manual_seed(9), dtype=torch.float64).log_softmax(0)
    logits = torch.tensor([60.0] + [-60.0] * 8, dtype=torch.float64)
    log_prob = floored_log_prob(logits, base, 0.1)
    assert float(log_prob.exp().sum()) == pytest.approx(1)
    assert (log_prob.exp() >= 0.1 * base.exp() - 1e-12).all()
    torch.testing.assert_close(floored_log_prob(base, base, 0.1), base)  # untuned: the base itself
    torch.testing.assert_close(floored_log_prob(logits, base, 0.0), logits.log_softmax(0))


def test_preference_pairs_stay_in_their_group_and_point_up():
    rng = torch.Generator().manual_seed(10)
    reward = torch.randint(4, (60,), generator=rng).double()
    group = torch.randint(12, (60,), generator=rng)
    pairs = preference_pairs(reward, group, rng)
    chosen, rejected = pairs.T
    assert len(pairs) > 20
    assert (reward[chosen] > reward[rejected]).all()
    assert torch.equal(group[chosen], group[rejected])
    assert len(torch.unique(pairs, dim=0)) == len(pairs)
    assert len(preference_pairs(reward, torch.arange(60), rng)) == 0  # nobody to compare with
    assert len(preference_pairs(torch.ones(60), group, rng)) == 0  # nothing to prefer


def test_adaptive_beta_finds_the_target():
    """With KL = c / beta^2 (a linear response), the controller settles where KL meets its target."""
    beta = 1.0
    for _ in range(60):
        beta = adapt_beta(beta, kl=0.3 / beta**2, target=4.0)
    assert 0.3 / beta**2 == pytest.approx(4.0, rel=0.02)
    assert adapt_beta(1.0, kl=1e9, target=1.0) == pytest.approx(1.3)  # bounded steps both ways
    assert adapt_beta(1.0, kl=0.0, target=1.0) == pytest.approx(0.7)
