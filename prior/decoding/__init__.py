"""Drawing from priors: sampling rules, generation, cached decoding."""
