use crate::*;

#[test]
fn the_expert_always_succeeds() {
    let mut longest = 0;
    for seed in 0..2000 {
        let split = if seed % 5 == 0 { Split::HeldOut } else { Split::Train };
        let mut world = World::new(Scene::random(&mut Rng::new(seed), split));
        while world.outcome().is_none() {
            world.step(&expert::act(&world));
        }
        assert_eq!(world.outcome(), Some(Outcome::Success), "seed {seed}: {world:?}");
        longest = longest.max(world.steps);
    }
    assert!(longest < World::LIMIT / 2, "{longest}");
}
