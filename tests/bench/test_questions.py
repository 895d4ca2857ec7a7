import pytest

from bench.pairs import Line
from bench.questions import GREEDY, compare_questions, count_work, prompts_for
from merv_fast import load_vid, sample_clip


@pytest.fixture(scope="module")
def vidlm(random_merv):
    return load_vid(random_merv)


def test_questions_cost_one_encoding_one_visual_prefill_and_short_decodes(vidlm):
    prompts, visual = prompts_for(vidlm, 4), vidlm.model.video_model.num_video_tokens
    lengths = [len(vidlm.tokenizer(prompt).input_ids) for prompt in prompts]

    apart, work = count_work(vidlm, lambda: [vidlm.generate(sample_clip(), prompt, **GREEDY) for prompt in prompts])
    assert (work.encoded, work.visual) == (4, 4)
    assert work.prefilled == sum(lengths) + 4 * visual
    decoded = work.decoded

    together, work = count_work(vidlm, lambda: vidlm.generate(sample_clip(), prompts, **GREEDY))
    assert together == apart
    assert (work.encoded, work.visual, work.decoded) == (1, 1, decoded)
    # BOS and "In:" go with the video; each question takes as many positions as the longest.
    assert visual < work.prefilled <= visual + 4 * max(lengths)

    kept, work = count_work(vidlm, lambda: vidlm.encode(sample_clip(), prefill=True))
    assert (work.encoded, work.visual, work.prefilled, work.decoded) == (1, 1, 1 + visual, 0)
    later, work = count_work(vidlm, lambda: [vidlm.generate(kept, prompt, **GREEDY) for prompt in prompts])
    assert later == apart
    assert (work.encoded, work.visual, work.decoded) == (0, 0, decoded)
    assert work.prefilled == sum(lengths) - 4


def test_the_lines_are_timed(vidlm):
    lines = compare_questions(vidlm, sample_clip(), 2, rounds=2)
    assert [type(line) for line in lines] == [Line] * 3
    assert vidlm.cache is None
