"""Diffusion and flow models as policies: steps with log-probabilities, processes, denoisers of diffusers, bundled tasks."""
