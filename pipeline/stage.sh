#!/bin/sh
# Run a stage with the Python that belongs to this project: the one that started DVC (QPRUNER_PYTHON), else that of the
# active environment, else that of .venv. A plain shell has none of it on its PATH.
if [ -n "${QPRUNER_PYTHON:-}" ]; then
  python=$QPRUNER_PYTHON
elif [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x .venv/bin/python ]; then
  python=.venv/bin/python
else
  python=python
fi
exec "$python" -m pipeline "$@"
