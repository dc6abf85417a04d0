"""What every training needs: steps that can be cut and resumed, precision, processes, progress."""
