"""How far image classifiers fall when cameras damage images, as a reproducible data pipeline."""
