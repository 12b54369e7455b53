"""Codegrid: tokenizers and priors for discrete image models.

python train.py stage=vqgan quantizer.K=512
"""

from codegrid.engine.command import main

if __name__ == "__main__":
    main()
