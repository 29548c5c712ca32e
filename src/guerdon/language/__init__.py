"""Language models as policies: sampling, log-probabilities, data files and bundled tasks."""
