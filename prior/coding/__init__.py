"""Images as files: codes by arithmetic coding under a prior."""
