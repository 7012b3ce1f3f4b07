"""The newsroom: a generated corpus whose facts are known, and a small language model pre-trained on it.

The embedded default of mechscope's studies and its planted truth: where the facts stand in an article and its summary is known, and any fact
can be swapped for another in line token by token. The model has learnt how the news is written and copies what, where and when something
happened from the first mention; not who, nor how many (see its card). It was started with an induction circuit written into its weights.
"""

from mechscope.data.newsroom.articles import ROLES, Article, Fact, Role, generate, split_articles
from mechscope.data.newsroom.counterfactual import counterfactual
from mechscope.data.newsroom.shipped import newsroom_model_path, newsroom_tokenizer

__all__ = ["ROLES", "Article", "Fact", "Role", "counterfactual", "generate", "newsroom_model_path", "newsroom_tokenizer", "split_articles"]
