"""What every training needs: a loop that can be interrupted and resumed, precision, processes, progress."""
