"""The registry of seqio tasks and mixtures on the shipped corpora, filled when this module is imported.

Text to text (`text`): `bible_en_es`, `bible_es_en`, `wordnet_supersense`; mixtures `bible_translation` (both
directions) and `quickstart` (`bible_en_es` and `wordnet_supersense`).
Pre-training (`pretraining`): `austen_` and `span_corruption`, `masked_lm`, `whole_word_masked_lm`,
`full_sentences`, `causal_lm`, `prefix_lm` or `permutation_lm`.
For encoders (`encoder`): `wordnet_supersense_label`, `bible_punctuation`, `wordnet_class_member`,
`wordnet_definition_choice`.
"""

import dataclasses
import difflib

import seqio

from t5x_like.data.tasks import encoder, pretraining, text
from t5x_like.errors import UserError

_TASKS = (*text.TASKS, *pretraining.TASKS, *encoder.TASKS)
_MIXTURES = {  # rates count examples
    "bible_translation": [("bible_en_es", 1.0), ("bible_es_en", 1.0)],
    "quickstart": [("bible_en_es", 1.0), ("wordnet_supersense", 1.0)],
}


def register() -> None:
    """Adds what seqio's registries lack: on import, and again in `get_task_or_mixture` if they were reset."""
    for task in _TASKS:
        if task.name not in seqio.TaskRegistry.names():
            seqio.TaskRegistry.add_provider(task.name, task)
    for name, rates in _MIXTURES.items():
        if name not in seqio.MixtureRegistry.names():
            seqio.MixtureRegistry.add(name, rates)


def get_task_or_mixture(name: str) -> seqio.Task | seqio.Mixture:
    """The task or mixture of that name, ours or any that an imported module has registered.

    Raises:
        UserError: if there is none; it names the nearest ones.
    """
    register()
    known = [*seqio.MixtureRegistry.names(), *seqio.TaskRegistry.names()]
    if name not in known:
        nearest = difflib.get_close_matches(name, known) or sorted(known)
        raise UserError(
            f"no seqio task or mixture is named {name!r}; the nearest: {', '.join(nearest)}. "
            "A task of your own is found once the module that registers it is imported"
        )
    return seqio.get_mixture_or_task(name)


def with_vocabulary(task: seqio.Task, vocabulary: seqio.Vocabulary) -> seqio.Task:
    """The same task with another vocabulary, not registered; features that are no text keep theirs.

    A task that changes is no longer read from seqio's offline cache, which holds the old vocabulary's ids.

    Raises:
        UserError: if the task is of a subclass of `seqio.Task`, which seqio cannot copy.
    """
    features = {
        name: feature
        if isinstance(feature.vocabulary, seqio.PassThroughVocabulary)
        else dataclasses.replace(feature, vocabulary=vocabulary)
        for name, feature in task.output_features.items()
    }
    if features == task.output_features:
        return task
    if type(task) is not seqio.Task:
        raise UserError(f"task {task.name!r} is a {type(task).__name__}; only a plain seqio.Task can change vocabulary")
    steps = [step for step in task.preprocessors if not isinstance(step, seqio.CacheDatasetPlaceholder)]
    return task.replace(output_features=features, preprocessors=steps)


register()
