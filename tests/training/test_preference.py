"""The preference loop: micro-batches, the reference scored beforehand, adapters, resume, recipes, bad data."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from guerdon.cli.main import main
from guerdon.errors import BindingError, DataError, RecipeError
from guerdon.language.data import read_rows
from guerdon.language.policy import LanguagePolicy
from guerdon.language.preferences import Singles, preference_rows
from guerdon.language.tasks import drafts, topics
from guerdon.language.tasks.stream import Stream
from guerdon.objectives import aot, copo_loss, cpo, dpo, kto, orpo, simpo, srpo
from guerdon.recipes.schema import load_recipe
from guerdon.report import read_run, write_report
from guerdon.training import Optim, Preference, Supervised
from guerdon.training.reference_scores import ReferenceScores

PAIRS = topics.pairs(0, count=24)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GUERDON_CACHE", str(tmp_path / "cache"))


def policy(*, lora: bool = False, reference: bool = True, seed: int = 0) -> LanguagePolicy:
    torch.manual_seed(seed)  # of the adapters
    found = LanguagePolicy.load(
        topics.model(seed),
        tokenizer=topics.tokenizer(),
        max_new_tokens=13,
        dtype="float64",
        lora={"rank": 2} if lora else None,
        revision=drafts.REVISION,
    )
    if reference:
        found.keep_reference()
    return found


def trained(objective, *, steps: int = 3, **settings):
    who = settings.pop("policy", None) or policy()
    rows = settings.pop("rows", PAIRS)
    loop = Preference(who, rows, objective, optim=Optim(lr=3e-3), steps=steps, **{"batch_size": 8, **settings})
    return loop, [loop.step() for _ in range(steps)]


def weights(loop) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in loop.policy.state_dict().items()}


def apart(first, second) -> float:
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.mark.parametrize("objective", [dpo, partial(simpo, sft_weight=0.5), cpo, orpo, kto, srpo])
def test_micro_batches_change_nothing(objective):
    rows = Singles(PAIRS) if objective is kto else PAIRS
    (whole, first), (parts, second) = (trained(objective, rows=rows, micro_batch=size) for size in (None, 3))
    assert apart(weights(whole), weights(parts)) < 1e-9
    for one, other in zip(first, second, strict=True):
        for name in set(one) - {"tokens_per_s"}:
            assert one[name] == pytest.approx(other[name], rel=1e-6, abs=1e-7), name
    held_out = topics.held_out_pairs(10)
    held_out = Singles(held_out) if objective is kto else held_out
    assert whole.evaluate(held_out).metrics["eval/accuracy"] == parts.evaluate(held_out).metrics["eval/accuracy"]


def test_a_step_is_what_the_equations_say():
    loop, (metrics,) = trained(dpo, steps=1)
    # at the reference: log 2 for every pair, no margin, no pair ranked right
    assert metrics["loss"] == pytest.approx(0.6931472)
    assert metrics["margin"] == pytest.approx(0.0, abs=1e-9)
    order = loop.sampler._permutation(0, 24)[:8]
    chosen = [len(PAIRS[i]["chosen"]) + 1 for i in order]  # and the end
    rejected = [len(PAIRS[i]["rejected"]) + 1 for i in order]
    assert metrics["length_chosen"] == pytest.approx(sum(chosen) / 8)
    assert metrics["length_rejected"] == pytest.approx(sum(rejected) / 8)
    assert metrics["tokens"] == sum(chosen) + sum(rejected)


def test_it_learns_to_rank():
    loop, steps = trained(partial(dpo, beta=0.5), steps=20, batch_size=24)
    assert steps[-1]["accuracy"] > 0.9
    assert steps[-1]["loss"] < 0.3
    found = loop.evaluate(PAIRS[:])
    assert found.metrics["eval/loss"] < 0.3
    assert sum(found.histograms["margin"]["counts"]) == 24
    assert found.histograms["reward_chosen"]["edges"][0] < found.histograms["reward_chosen"]["edges"][-1]


@pytest.mark.parametrize(("objective", "lora"), [(dpo, False), (dpo, True), (srpo, True)])
def test_a_reference_scored_beforehand_is_the_same(objective, lora, tmp_path):
    live, _ = trained(objective, policy=policy(lora=lora))
    start = policy(lora=lora, reference=False)
    scores = ReferenceScores(start, PAIRS, live.form.pack, batch=5)
    kept, _ = trained(objective, policy=start, reference=scores)
    assert not start._reference
    assert apart(weights(live), weights(kept)) < 1e-9
    files = list((tmp_path / "cache/reference").iterdir())
    assert len(files) == 1
    # read again, not made again; other weights and other rows have other files
    modified = files[0].stat().st_mtime_ns
    ReferenceScores(policy(lora=lora, reference=False), PAIRS, live.form.pack)
    assert files[0].stat().st_mtime_ns == modified
    others = ((policy(seed=1), PAIRS), (policy(), PAIRS[:23]))
    paths = {ReferenceScores(who, rows, live.form.pack).path for who, rows in others}
    assert len(paths | {scores.path}) == 3


def test_a_damaged_file_of_scores_is_made_again():
    start, loop = policy(), Preference(policy(), PAIRS, dpo)
    scores = ReferenceScores(start, PAIRS, loop.form.pack)
    content = bytearray(scores.path.read_bytes())
    content[-3] ^= 1
    scores.path.write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged"):
        again = ReferenceScores(start, PAIRS, loop.form.pack)
    assert torch.equal(again.values, scores.values)


def test_scores_of_other_rows_are_refused():
    loop = Preference(policy(), PAIRS, dpo)
    scores = ReferenceScores(policy(), PAIRS, loop.form.pack)
    lengths = [len(row["chosen"]) for row in PAIRS[:]]
    other = next(i for i in range(24) if lengths[i] != lengths[0])
    packed = loop.form.pack(loop.policy, [PAIRS[other]])
    with pytest.raises(DataError, match="row 0 is not the one that was scored"):
        scores.of([0], packed)


def test_adapters_off_are_the_reference():
    loop, steps = trained(dpo, policy=policy(lora=True))
    assert steps[0]["loss"] == pytest.approx(0.6931472)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert all("lora" in name for name, p in loop.policy.named_parameters() if p.requires_grad)


def test_a_stopped_run_goes_on_exactly():
    straight, _ = trained(simpo, steps=4)
    first, _ = trained(simpo, steps=2)
    first.settings.build(first.policy.parameters(), 4)
    state, kept = first.state(), weights(first)
    second = Preference(policy(), PAIRS, simpo, batch_size=8, optim=Optim(lr=3e-3), steps=4)
    second.policy.load_state_dict(kept)
    second.load_state(state)
    second.step()
    second.step()
    assert apart(weights(straight), weights(second)) == 0.0


def test_the_mismatched_samples_of_kto():
    """The completion of the row before after each prompt, over the whole batch, whatever the micro-batches."""
    rows = Singles(PAIRS)[:4]
    who = policy()
    with torch.no_grad():
        for parameter in who.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    other = who.pack([row["prompt"] for row in rows], [[rows[i - 1]["completion"]] for i in range(4)])
    ratio = who.log_prob(other).logp - who.reference_log_prob(other)
    expected = max(ratio.where(other.mask, 0.0).sum(-1).mean().item(), 0.0)
    loop = Preference(who, rows, kto, batch_size=4, micro_batch=2, optim=Optim(lr=0.0))
    loop.sampler.shuffle = False
    assert loop.step()["reference_point"] == pytest.approx(expected, abs=1e-9)


def test_a_guide_gives_a_field():
    def guided(
        logp_chosen, logp_rejected, logp_guide_chosen, logp_ref_chosen, logp_ref_rejected, mask_chosen, mask_rejected
    ):
        assert not logp_guide_chosen.requires_grad
        assert not torch.is_grad_enabled() or not torch.allclose(logp_guide_chosen, logp_ref_chosen)
        return dpo(logp_chosen, logp_rejected, logp_ref_chosen, logp_ref_rejected, mask_chosen, mask_rejected)

    trained(guided, steps=1, guides={"guide": policy(seed=1)})
    with pytest.raises(BindingError, match="logp_guide_chosen"):
        trained(guided, steps=1)


# pairs with drafts

SIX = [f"{side}{draft}" for draft in ("", "_given_chosen", "_given_rejected") for side in ("chosen", "rejected")]


@pytest.mark.parametrize("lora", [False, True])
def test_samples_are_scored_as_revisions_of_either(lora):
    """By policy and reference alike, each after the prompt that `policy.revision` makes of the draft."""
    who, rows, seen = policy(lora=lora), PAIRS[:4], {}
    start = policy(lora=lora)
    with torch.no_grad():
        for parameter in who.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))

    def objective(
        logp_chosen, logp_rejected,
        logp_chosen_given_chosen, logp_rejected_given_chosen,
        logp_chosen_given_rejected, logp_rejected_given_rejected,
        logp_ref_chosen, logp_ref_rejected,
        logp_ref_chosen_given_chosen, logp_ref_rejected_given_chosen,
        logp_ref_chosen_given_rejected, logp_ref_rejected_given_rejected,
        mask_chosen, mask_rejected,
    ):  # fmt: skip
        seen.update({name: value for name, value in locals().items() if isinstance(value, torch.Tensor)})
        return srpo(**seen)

    loop = Preference(who, rows, objective, batch_size=4, optim=Optim(lr=0.0))
    loop.sampler.shuffle = False
    found = loop.step()
    for p, row in enumerate(rows):
        for name in SIX:
            side, _, draft = name.partition("_given_")
            prompt = row["prompt"] + (row[draft] + row["prompt"] if draft else "")
            packed = who.pack([prompt], [[row[side]]])
            n = int(packed.mask.sum())
            with torch.no_grad():
                expected = {"logp": who.log_prob(packed).logp, "logp_ref": start.start_log_prob(packed)}
            assert seen[f"mask_{side}"][p].sum() == n
            for of, value in expected.items():
                assert torch.allclose(seen[f"{of}_{name}"][p, :n], value[0, 0, :n], atol=1e-9), (of, name)
    assert seen["logp_chosen_given_rejected"].requires_grad
    # the reference of a revision is not that of an answer
    assert (seen["logp_ref_chosen_given_rejected"] - seen["logp_ref_chosen"]).nan_to_num().abs().max() > 1e-2
    assert found["tokens"] == 3 * sum(len(row["chosen"]) + len(row["rejected"]) + 2 for row in rows)
    assert found["length_chosen"] == pytest.approx(sum(len(row["chosen"]) + 1 for row in rows) / 4)


def test_learning_to_answer_and_to_revise():
    loop, steps = trained(partial(srpo, alpha=0.5), policy=policy(lora=True), steps=15, batch_size=24)
    assert steps[0]["loss"] == pytest.approx(1 - 0.5 / 2)
    assert steps[0]["draft_cut"] == 0.0
    assert steps[-1]["self_improvement_loss"] < 0.4
    assert steps[-1]["generative_loss"] < 0.8
    assert steps[-1]["accuracy"] > 0.6
    judged = loop.evaluate(PAIRS[:]).metrics
    assert judged["eval/loss"] < 0.6
    assert {"eval/margin", "eval/likelihood_accuracy", "eval/draft_cut"} <= set(judged)


def test_a_preference_column_is_the_aim():
    """Ties pull at nothing, and certain ones at the same as without the column."""
    rows = PAIRS[:8]
    ties, certain = ([{**row, "preference": p} for row in rows] for p in (0.5, 1))
    loop, (metrics,) = trained(srpo, rows=ties, steps=1)
    assert metrics["loss"] == pytest.approx(0.0, abs=1e-12)
    assert apart(weights(loop), weights(trained(srpo, rows=rows, steps=1)[0])) > 1e-4
    same = [weights(trained(srpo, rows=given, steps=1)[0]) for given in (certain, rows)]
    assert apart(*same) == 0.0


def test_pairs_of_the_same_sample_are_left_out():
    same = {**PAIRS[0], "rejected": PAIRS[0]["chosen"]}
    rows = [same, *PAIRS[:8], same]
    with pytest.warns(UserWarning, match="2 of 10 pairs are left out"):
        loop, _ = trained(srpo, rows=rows, steps=2)
    assert len(loop.rows) == 8
    assert loop.rows[7]["chosen"] == PAIRS[7]["chosen"]
    plain, _ = trained(srpo, rows=PAIRS[:8], steps=2)
    assert apart(weights(loop), weights(plain)) == 0.0
    with pytest.warns(UserWarning, match="1 of 3 pairs"):
        found = loop.evaluate([*PAIRS[:2], same])
    assert sum(found.histograms["margin"]["counts"]) == 2
    with pytest.warns(UserWarning, match="left out"), pytest.raises(DataError, match="no pair is left"):
        Preference(policy(), [same], srpo)
    endless = Preference(policy(), Stream(lambda i: same), srpo, batch_size=2)
    with pytest.raises(DataError, match="chosen and rejected are the same"):
        endless.step()
    # a loss without drafts loses nothing by them
    assert len(trained(dpo, rows=rows, steps=1)[0].rows) == 10


def test_drafts_that_do_not_fit_are_cut_and_counted():
    """64 positions, of which 41 are for the longest sample and its end, and 3 for the prompt: 20 are left for a draft."""
    rows = [{**PAIRS[i], "chosen": "ab" * half, "rejected": "cd"} for i, half in enumerate((3, 10, 20))]
    _, (metrics,) = trained(srpo, rows=rows, batch_size=3, steps=1)
    assert metrics["draft_cut"] == pytest.approx((0 + 0 + 1 / 2) / 3)
    _, (metrics,) = trained(srpo, rows=rows[:2], batch_size=2, steps=1)
    assert metrics["draft_cut"] == 0.0


def test_what_does_not_fit():
    with pytest.raises(BindingError, match="is no preference loss"):
        Preference(policy(), PAIRS, copo_loss)
    with pytest.raises(RecipeError, match="compares all pairs of a batch"):
        Preference(policy(), PAIRS, partial(aot, beta=0.2), batch_size=8, micro_batch=4)
    rows = Singles(PAIRS)
    loop = Preference(policy(), rows, kto)
    scores = ReferenceScores(policy(), rows, loop.form.pack)
    with pytest.raises(RecipeError, match=r"reference\.precompute"):
        Preference(policy(), rows, kto, reference=scores)


# data


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_rows(path)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_forms_of_pairs(tmp_path):
    rows = write(
        tmp_path / "pairs.jsonl",
        [
            {"prompt": "a", "chosen": "b", "rejected": "c", "level": 3},
            {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
            {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
            {"prompt": [user("a")], "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
        ],
    )
    found = preference_rows(rows, "paired")[:]
    assert [(row["chosen"], row["rejected"]) for row in found] == [("b", "c")] * 4
    assert [row["prompt"] for row in found] == ["a", [user("a")], [user("a")], [user("a")]]
    assert found[0]["level"] == 3
    singles = preference_rows(rows, "unpaired")
    assert len(singles) == 8
    assert [(row["completion"], row["label"]) for row in singles[:2]] == [("b", True), ("c", False)]


def test_scores_and_labels(tmp_path):
    scored = write(tmp_path / "s.jsonl", [{"prompt": "a", "completions": ["x", "y", "z"], "scores": [0.2, 0.9, 0.1]}])
    (row,) = preference_rows(scored, "paired")[:]
    assert (row["chosen"], row["rejected"], row["score_chosen"], row["score_rejected"]) == ("y", "z", 0.9, 0.1)
    labelled = write(tmp_path / "l.jsonl", [{"prompt": "a", "completion": "x", "label": v} for v in (True, 0, "false")])
    assert [row["label"] for row in preference_rows(labelled, "unpaired")[:]] == [True, False, False]
    with pytest.raises(DataError, match="use --objective kto"):
        preference_rows(labelled, "paired")


def test_every_malformed_row_is_reported_by_its_line(tmp_path):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    bad = [
        ({**good, "chosen": None}, "chosen is missing"),
        ({**good, "rejected": 3}, "rejected must be text or a list of messages; got a number"),
        ({**good, "chosen": ""}, "chosen is empty"),
        ({**good, "score_chosen": 1, "score_rejected": 2}, "score_chosen, 1, is below score_rejected, 2"),
        ({"chosen": "b", "rejected": "c"}, "prompt is missing"),
        ({**good, "chosen": [user("b")]}, "must be a message of the assistant"),
    ]
    rows = write(tmp_path / "pairs.jsonl", [good, *(row for row, _ in bad)])
    with pytest.raises(DataError) as caught:
        preference_rows(rows, "paired")
    message = str(caught.value)
    assert "6 rows are malformed" in message
    for number, (_, problem) in enumerate(bad[:5], 2):
        assert f"row {number - 1}" in message or f"line {number}" in message
        assert f": {problem}" in message
    with pytest.raises(DataError, match="label must be true or false; got 'maybe'"):
        preference_rows(write(tmp_path / "l.jsonl", [{"prompt": "a", "completion": "x", "label": "maybe"}]), "unpaired")
    with pytest.raises(DataError, match="none of the completions is better"):
        preference_rows(
            write(tmp_path / "s.jsonl", [{"prompt": "a", "completions": ["x", "y"], "scores": [1, 1]}]), "paired"
        )


# recipes


def test_a_trial_gives_way_to_ones_own(tmp_path):
    trial = load_recipe("dpo")
    assert (trial.policy.model, trial.data, trial.optim.lr) == ("topics", "topics", 1e-3)
    own = load_recipe("dpo", ["--policy.model", "m", "--data", "pairs.jsonl"])
    assert (own.policy.model, own.data, own.optim.lr, own.warm_start, own.watch) == ("m", "pairs.jsonl", 1e-6, None, {})
    with pytest.raises(RecipeError, match="data: must be given"):
        load_recipe("dpo", ["--policy.model", "m"])


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    topics.model(0).save_pretrained(tmp_path / "model")
    topics.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in topics.pairs(0, count=30)[:]))
    return tmp_path


OWN = ["--policy.model", "model", "--data", "pairs.jsonl", "--prompts_per_step", "8", "--policy.max_new_tokens", "13"]


def run(recipe, name, *more, steps=4):
    words = [*OWN, "--steps", str(steps), "--optim.lr", "1e-3", "--run.name", name, "--evaluation.every", "2"]
    assert main(["train", recipe, *words, "--run.checkpoint_every", "2", *more]) == 0


def test_a_run_on_ones_own_data(workplace):
    run("dpo", "a", "--preference.precompute", "true", "--watch.quality", "guerdon.language.tasks.topics:quality")
    run("dpo", "b", "--watch.quality", "guerdon.language.tasks.topics:quality")
    last = {}
    for name in "ab":
        found = read_run(workplace / "runs" / name)
        assert {"loss", "accuracy", "margin_std", "eval/accuracy", "eval/sampled/quality_win_rate"} <= set(
            found.metrics[-1]
        )
        last[name] = found.metrics[-1]
        pairs = [json.loads(line) for line in (workplace / "runs" / name / "pairs.jsonl").read_text().splitlines()]
        assert [line["step"] for line in pairs] == [0, 2, 4]
        page = write_report(workplace / "runs" / name).read_text()
        assert "Implicit reward" in page
    for key in ("loss", "margin", "eval/loss", "eval/sampled/quality"):
        assert last["a"][key] == pytest.approx(last["b"][key], abs=1e-5)


def test_a_resumed_run_is_the_same(workplace):
    run("simpo", "straight")
    run("simpo", "stopped", steps=2)
    assert main(["resume", "runs/stopped", "--steps", "4"]) == 0
    ours, theirs = (
        load_file(f"runs/{name}/checkpoints/step-4/policy/model.safetensors") for name in ("straight", "stopped")
    )
    # the schedule of a shorter run differs: only the constant one is comparable
    assert set(ours) == set(theirs)
    last = [read_run(workplace / "runs" / name).metrics[-1]["step"] for name in ("straight", "stopped")]
    assert last == [4, 4]


@pytest.mark.parametrize("precompute", ["true", "false"])
def test_srpo_on_ones_own_data(workplace, precompute):
    same = {"prompt": "A", "chosen": "ae", "rejected": "ae"}
    path = workplace / "pairs.jsonl"
    path.write_text(json.dumps(same) + "\n" + path.read_text())
    watch = ["--watch.quality", "guerdon.language.tasks.topics:quality", "--policy.revision", "{prompt}{draft}{prompt}"]
    with pytest.warns(UserWarning, match="1 of 25 pairs are left out"):
        run("srpo", "a", "--preference.precompute", precompute, "--policy.lora", "{rank: 2}", *watch)
    found = read_run(workplace / "runs/a")
    last = found.metrics[-1]
    assert {"generative_loss", "draft_cut", "eval/accuracy", "eval/revised_1/quality_win_rate"} <= set(last)
    assert found.recipe["policy"]["revision"].count("{draft}") == 1
    assert "Implicit reward" in write_report(workplace / "runs/a").read_text()
    with pytest.warns(UserWarning, match="1 of 25 pairs"):
        assert main(["resume", "runs/a", "--steps", "5"]) == 0


def test_srpo_as_it_can_be_tried(workplace):
    few = ["--steps", "2", "--warm_start.steps", "2", "--evaluation.size", "8", "--prompts_per_step", "4"]
    assert main(["train", "srpo", "--run.name", "trial", *few]) == 0
    last = read_run(workplace / "runs/trial").metrics[-1]
    assert {f"eval/{mode}/quality" for mode in ("sampled", "revised_1", "revised_2")} <= set(last)
    lines = (workplace / "runs/trial/samples.jsonl").read_text().splitlines()
    modes = {json.loads(line).get("mode") for line in lines}
    assert {"sampled", "revised_1", "revised_2"} <= modes


def test_revisions_need_samples():
    with pytest.raises(RecipeError, match=r"evaluation\.revisions: revises the samples of a language policy"):
        load_recipe("srpo", {"evaluation.samples": 0})
    with pytest.raises(RecipeError, match=r"evaluation\.revisions"):
        load_recipe("shapes", {"evaluation.revisions": 1})


def test_warm_start_on_chosen_samples(workplace):
    run(
        "orpo.yaml" if False else "dpo",
        "warm",
        "--objective",
        "orpo",
        "--warm_start.steps",
        "2",
        "--warm_start.batch_size",
        "4",
    )
    assert len((workplace / "runs/warm/supervised.jsonl").read_text().splitlines()) == 2


def test_the_supervised_loop_still_reads_completions():
    loop = Supervised(policy(reference=False), topics.demonstrations(0), batch_size=4, steps=2)
    assert loop.step()["loss"] > 0
