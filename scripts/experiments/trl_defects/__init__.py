"""What TRL 1.16 does wrong and we mend, each as one file that needs TRL alone: for a pull request there."""
