"""The pairs that fastdup lists in a folder of pictures, run by a Python that has fastdup (copy_peers.py).

    PYTHON pipelines/bench/fastdup_peer.py FOLDER WORK PAIRS.csv

fastdup needs versions of numpy and pandas that Seedbed does not have, so it gets an environment of its own. PAIRS.csv
has the two paths and the cosine of each pair of nearest neighbours.
"""

import sys

import fastdup

# Neighbours of each picture. Assumed: more than the copies of one original.
NUM_NEIGHBORS = 20
# fastdup's default is 0.9; a sweep needs lower ones.
MIN_COSINE = 0.5

if __name__ == "__main__":
    folder, work, output = sys.argv[1:]
    dataset = fastdup.create(input_dir=folder, work_dir=work)
    dataset.run(threshold=MIN_COSINE, nearest_neighbors_k=NUM_NEIGHBORS, overwrite=True, print_summary=False)
    pairs = dataset.similarity()[["filename_from", "filename_to", "distance"]]
    pairs.to_csv(output, index=False, header=False)
