"""How often pi0's guesses of what π0-FAST writes next (crates/model/src/propose.rs) would be right.

Random weights say nothing of it, so the answers are those of a policy that writes exactly what an expert does: the put tasks of
the demo's table (crates/demo), as a robot asks for chunks along an episode, in codes of byte pairs fitted to other episodes.

    pip install numpy scipy tokenizers && python scripts/fast-guesses.py
"""

import numpy as np
from scipy.fft import dct
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

OPEN, STEP, FINGER_STEP, REACH, TOP, GRASPED, PACE, TRAVEL = 0.06, 0.025, 0.03, 0.14, 0.10, 0.03, 0.022, 0.08
CONTEXT, REMEMBERED = 8, 16
rng = np.random.default_rng(1)


class World:
    """One thing to put into a bowl: crates/demo/src/world.rs and expert.rs."""

    def __init__(self):
        self.thing, self.bowl = rng.uniform(-0.1, 0.1, 2), rng.uniform(-0.1, 0.1, 2)
        while np.hypot(*(self.thing - self.bowl)) < 0.06:
            self.bowl = rng.uniform(-0.1, 0.1, 2)
        self.gripper = np.array([*rng.uniform(-0.1, 0.1, 2), 0.08, OPEN])
        self.held, self.done, self.offset = False, False, 0.0

    def copy(self):
        other = World.__new__(World)
        other.__dict__ = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in self.__dict__.items()}
        return other

    def approach(self, to, near, height, opening):
        g = self.gripper
        far = np.hypot(*(g[:2] - to))
        z = height[0] + (height[1] - height[0]) * np.clip((far - near[0]) / (near[1] - near[0]), 0, 1)
        pace = PACE / far if far * 0.8 > PACE else 0.8
        pace *= np.clip(1 - max(z - g[2] - 0.01, 0) / 0.05, 0.15, 1)
        return np.array([*((to - g[:2]) * pace), np.clip(z - g[2], -STEP, STEP), opening])

    def act(self):
        g = self.gripper
        if self.done:
            return np.array([0, 0, 0, OPEN])
        if self.held:
            action = self.approach(self.bowl, (0.012, 0.06), (0.045, TRAVEL), 0.0)
            if np.hypot(*(g[:2] - self.bowl)) < 0.014 and g[2] < 0.056:
                action[3] = OPEN
            return action
        floor = 0.006 if g[3] > 0.052 else 0.055
        action = self.approach(self.thing, (0.007, 0.035), (floor, TRAVEL), OPEN)
        if np.hypot(*(g[:2] - self.thing)) < 0.007 and g[2] < 0.013 and g[3] > 0.052:
            action[3] = 0.0
        return action

    def step(self, action):
        g = self.gripper
        g[:2] = np.clip(g[:2] + np.clip(action[:2], -STEP, STEP), -REACH, REACH)
        g[2] = np.clip(g[2] + np.clip(action[2], -STEP, STEP), 0, TOP)
        before = g[3]
        g[3] = before + np.clip(np.clip(action[3], 0, OPEN) - before, -FINGER_STEP, FINGER_STEP)
        if self.held and g[3] > GRASPED:
            self.held, self.done = False, np.hypot(*(self.thing - self.bowl)) < 0.03
        elif self.held:
            g[3] = GRASPED
        elif before > GRASPED >= g[3] and not self.done:
            if np.all(np.abs(self.thing - g[:2]) < 0.013) and g[2] <= 0.016:
                self.held, self.offset, g[3] = True, self.thing[1] - g[1], GRASPED
        if self.held:
            self.thing = np.array([g[0], g[1] + self.offset])

    def chunk(self, horizon):
        world, actions = self.copy(), []
        for _ in range(horizon):
            actions.append(world.act())
            world.step(actions[-1])
        return np.array(actions)


def episode(horizon, every, noise):
    """The chunks that a robot asks for, one for each `every` actions."""
    world, chunks = World(), []
    for t in range(80):
        if t % every == 0:
            chunks.append(world.chunk(horizon))
        world.step(world.act() + np.array([*rng.normal(0, noise, 3), 0]))
        if world.done:
            break
    return chunks


def codec(horizon):
    """FAST fitted to the expert's chunks: from a chunk to codes."""
    chunks = [chunk for _ in range(400) for chunk in episode(horizon, 1, 0.002)]
    low, high = (np.quantile(np.concatenate(chunks), q, 0) for q in (0.01, 0.99))

    def numbers(chunk):
        normal = np.clip((chunk - low) / (high - low + 1e-6) * 2 - 1, -1.5, 1.5)
        return np.round(10 * dct(normal, axis=0, norm="ortho")).astype(int).flatten()

    least = min(numbers(chunk).min() for chunk in chunks)
    text = lambda chunk: "".join(chr(max(n - least, 0)) for n in numbers(chunk))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1024, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(map(text, chunks), trainer)
    return lambda chunk: tokenizer.encode(text(chunk)).ids


def propose(text, answers, most, enough):
    best = None
    for source in [*answers, text]:
        for at in range(1, len(source)):
            agreed = 0
            while agreed < min(CONTEXT, at, len(text)) and source[at - 1 - agreed] == text[-1 - agreed]:
                agreed += 1
            distance = abs(at - len(text))
            if agreed >= enough or (agreed == len(text) and distance == 0):
                found = (CONTEXT - agreed, distance)
                if best is None or found < best[0]:
                    best = (found, source[at : at + most])
    return best[1] if best else []


def write(answer, answers, enough, most):
    """Passes, guesses, and guesses that are right, behind the first token."""
    text, passes, guesses, right, trust = answer[:1], 0, 0, 0, most
    while len(text) < len(answer):
        # Without memory the opening alone is guessed.
        opening = answer[1:3] if len(text) == 1 else []
        guess = opening if enough is None else propose(text, answers, min(most, trust), enough)
        rest = answer[len(text) :]
        agreed = next((i for i, (a, b) in enumerate(zip(guess, rest)) if a != b), min(len(guess), len(rest)))
        passes, guesses, right = passes + 1, guesses + len(guess), right + agreed
        text = answer[: len(text) + agreed + 1]
        trust = min(most, 2 * (agreed + 1))
    return np.array([passes, guesses, right])


for horizon in (8, 16, 32):
    codes = codec(horizon)
    for every in (1, horizon // 2):
        answers, tokens, count = [], 0, 0
        rules = {
            "the opening alone": (None, 2),
            "two tokens agree, up to 3 guesses (pi0)": (2, 3),
            "two tokens agree, up to 7 guesses": (2, 7),
            "one token agrees, up to 7 guesses": (1, 7),
        }
        sums = {rule: np.zeros(3) for rule in rules}
        for chunk in (chunk for _ in range(25) for chunk in episode(horizon, every, 0.001)):
            answer = [-1, -2, -3, *codes(chunk), -4]  # `Action`, `:`, a space; `|`
            tokens, count = tokens + len(answer) - 1, count + 1
            for rule, (enough, most) in rules.items():
                sums[rule] += write(answer, answers, enough, most)
            answers = [answer, *(a for a in answers if a != answer)][:REMEMBERED]
        print(f"{horizon} actions, a new chunk each {every}: {count} answers of {tokens / count + 1:.0f} tokens")
        for rule, (passes, guesses, right) in sums.items():
            print(
                f"  {rule}: {tokens / passes:.2f} tokens a pass, {guesses / passes:.2f} guesses a pass, "
                f"{100 * right / max(guesses, 1):.0f} % right",
                flush=True,
            )
