from memento.rewards.pool import RewardPool as RewardPool
from memento.rewards.scoring import Scorer as Scorer
from memento.rewards.scoring import check_gold as check_gold
from memento.rewards.scoring import check_golds as check_golds
from memento.rewards.scoring import check_terms as check_terms
from memento.rewards.scoring import load_verified as load_verified
from memento.rewards.scoring import score as score
