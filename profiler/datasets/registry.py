"""Datasets by name: where they are hosted, which columns they need, and how a row becomes a prompt."""

from __future__ import annotations

import string
from dataclasses import dataclass

from profiler.errors import DatasetUsageError


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One entry of the registry.

    template: `str.format` template over column names; the columns that it names must exist.
    new_tokens: default maximum of generated tokens per problem: about the length of an answer.
    key: column that identifies a row in its source; None to use the row number.
    rows: number of rows of the split according to its card; 0 if the problems are embedded.
    prompt_characters: mean length of a prompt, for estimates when the dataset cannot be reached. Measured for humaneval, gsm8k,
    imdb, ag_news, squad and wikitext-2; from published statistics for the others.
    sorted_by_class: the file lists one class after the other, so its first rows are not a sample and rows are taken in shuffled
    order. Observed in IMDB's files; assumed for DBpedia's, where shuffling does no harm.
    min_characters: shorter prompts (headings, blank lines) are skipped.
    embedded: the problems ship with this package (`profiler/demo/prompts/`), so the hub is not needed.
    """

    name: str
    description: str
    template: str
    new_tokens: int = 128
    key: str | None = None
    hub_id: str | None = None
    config: str | None = None
    split: str | None = None
    rows: int = 0
    prompt_characters: int = 0
    sorted_by_class: bool = False
    min_characters: int = 0
    embedded: bool = False

    @property
    def columns(self) -> list[str]:
        """The columns from which the prompt and the key are built."""
        names = [name for _, name, _, _ in string.Formatter().parse(self.template) if name]
        return [*names, *([self.key] if self.key else [])]


DATASETS: dict[str, Dataset] = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            name="humaneval",
            description="Python functions to complete",
            template="{prompt}",
            new_tokens=256,
            key="task_id",
            hub_id="openai/openai_humaneval",
            split="test",
            rows=164,
            prompt_characters=451,
        ),
        Dataset(
            name="gsm8k",
            description="grade-school arithmetic word problems",
            template="Question: {question}\nAnswer:",
            new_tokens=256,
            hub_id="openai/gsm8k",
            config="main",
            split="test",
            rows=1319,
            prompt_characters=258,
        ),
        Dataset(
            name="imdb",
            description="movie reviews, positive or negative",
            template="Review: {text}\nSentiment:",
            new_tokens=8,
            hub_id="stanfordnlp/imdb",
            split="test",
            rows=25_000,
            prompt_characters=1323,
            sorted_by_class=True,
        ),
        Dataset(
            name="yelp",
            description="reviews of businesses, one to five stars",
            template="Review: {text}\nStars (1 to 5):",
            new_tokens=8,
            hub_id="Yelp/yelp_review_full",
            split="test",
            rows=50_000,
            prompt_characters=750,
        ),
        Dataset(
            name="ag_news",
            description="one-paragraph news articles on four topics",
            template="Article: {text}\nTopic:",
            new_tokens=8,
            hub_id="fancyzhx/ag_news",
            split="test",
            rows=7600,
            prompt_characters=254,
        ),
        Dataset(
            name="squad",
            description="questions about a Wikipedia paragraph",
            template="{context}\n\nQuestion: {question}\nAnswer:",
            new_tokens=32,
            key="id",
            hub_id="rajpurkar/squad",
            split="validation",
            rows=10_570,
            prompt_characters=874,
        ),
        Dataset(
            name="amazon",
            description="product reviews, positive or negative",
            template="Review: {title}. {content}\nSentiment:",
            new_tokens=8,
            hub_id="fancyzhx/amazon_polarity",
            split="test",
            rows=400_000,
            prompt_characters=450,
        ),
        Dataset(
            name="dbpedia",
            description="first paragraphs of Wikipedia articles, 14 classes",
            template="{title}: {content}\nCategory:",
            new_tokens=8,
            hub_id="fancyzhx/dbpedia_14",
            split="test",
            rows=70_000,
            prompt_characters=320,
            sorted_by_class=True,
        ),
        Dataset(
            name="wikitext-2",
            description="Wikipedia paragraphs, prefill only",
            template="{text}",
            new_tokens=1,
            hub_id="Salesforce/wikitext",
            config="wikitext-2-raw-v1",
            split="test",
            rows=4358,
            prompt_characters=699,
            min_characters=200,
        ),
        Dataset(
            name="cnn_dailymail",
            description="newspaper articles to summarize",
            template="{article}\n\nSummary:",
            key="id",
            hub_id="abisee/cnn_dailymail",
            config="3.0.0",
            split="test",
            rows=11_490,
            prompt_characters=4000,
        ),
        Dataset(
            name="xsum",
            description="BBC articles to summarize in a sentence",
            template="{document}\n\nSummary in one sentence:",
            new_tokens=48,
            key="id",
            hub_id="EdinburghNLP/xsum",
            split="test",
            rows=11_334,
            prompt_characters=2300,
        ),
        Dataset(
            name="multi_news",
            description="groups of articles on one event, to summarize",
            template="{document}\n\nSummary:",
            new_tokens=256,
            hub_id="alexfabbri/multi_news",
            split="test",
            rows=5622,
            prompt_characters=12000,
        ),
        Dataset(
            name="demo-math",
            description="arithmetic word problems, shipped with this package",
            template="Question: {text}\nAnswer:",
            new_tokens=64,
            embedded=True,
        ),
        Dataset(
            name="demo-code",
            description="Python functions to complete, shipped with this package",
            template="{text}",
            new_tokens=64,
            embedded=True,
        ),
        Dataset(
            name="demo-reviews",
            description="short reviews, shipped with this package",
            template="Review: {text}\nSentiment:",
            new_tokens=64,
            embedded=True,
        ),
    )
}

DEMO_DATASETS = tuple(name for name, dataset in DATASETS.items() if dataset.embedded)


def find_dataset(name: str) -> Dataset:
    """The dataset called `name`. Raises `DatasetError`, listing all datasets, if the name is unknown."""
    if name not in DATASETS:
        raise DatasetUsageError(f"unknown dataset {name!r}: expected one of {', '.join(DATASETS)}")
    return DATASETS[name]
