"""One trial: a bit vector becomes a model that is recovered, judged and measured."""
