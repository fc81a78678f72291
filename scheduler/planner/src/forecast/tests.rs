//! What is expected after windows of known kinds.

use super::*;

fn seen(windows: &[Vec<f64>]) -> Forecast {
    let mut forecast = Forecast::new(vec![windows[0].len()]);
    for window in windows {
        assert_eq!(forecast.observe(std::slice::from_ref(window)), vec![]);
    }
    forecast
}

#[test]
fn windows_that_are_alike_are_expected_again() {
    let window = vec![600.0, 300.0, 100.0];
    let expected = seen(&vec![window.clone(); 5]).expect().unwrap().remove(0);
    assert!(expected.iter().zip(&window).all(|(one, other)| (one - other).abs() < 1e-6), "{expected:?}");
    assert_eq!(seen(&[window]).tokens().unwrap(), vec![vec![600, 300, 100]]);
}

#[test]
fn a_steady_trend_is_followed() {
    let window = |at: u32| (0..40).map(|e| 5000.0 + f64::from(at) * f64::from(e - 20) * 8.0).collect::<Vec<_>>();
    let expected = seen(&(0..8).map(window).collect::<Vec<_>>()).expect().unwrap().remove(0);
    let (now, next) = (window(7), window(8));
    let miss = |of: &[f64]| of.iter().zip(&next).map(|(one, other)| (one - other).abs()).sum::<f64>();
    assert!(miss(&expected) < 0.3 * miss(&now), "{} of {}", miss(&expected), miss(&now));
}

#[test]
fn noise_is_smoothed() {
    let noise = |at: u32, e: u32| f64::from((at * 7919 + e * 104_729 + at * e * 31) % 101) - 50.0;
    let window = |at: u32| (0..200).map(|e| 1000.0 + noise(at, e)).collect::<Vec<_>>();
    let windows: Vec<_> = (0..10).map(window).collect();
    let miss = |of: &[f64]| of.iter().map(|load| (load - 1000.0).abs()).sum::<f64>();
    let expected = seen(&windows).expect().unwrap().remove(0);
    assert!(miss(&expected) < 0.9 * miss(&windows[9]), "{} of {}", miss(&expected), miss(&windows[9]));
}

#[test]
fn a_task_switch_forgets_the_task_before() {
    let calm = vec![900.0, 50.0, 50.0];
    let mut forecast = seen(&vec![calm; 4]);
    assert!(!forecast.switched());
    forecast.observe(&[vec![50.0, 50.0, 900.0]]);
    assert!(forecast.switched());
    let expected = forecast.tokens().unwrap().remove(0);
    assert!(expected[0] < 100 && expected[2] > 850, "{expected:?}: a twentieth of what was seen before is kept");
}

#[test]
fn what_lasts_is_longer_the_calmer_the_loads() {
    let window = |at: u32, drift: u32| {
        (0..40).map(|e| f64::from(50_000 + at * drift * if e % 2 == 0 { 2 } else { 0 })).collect::<Vec<_>>()
    };
    let lasts = |drift| seen(&(0..8).map(|at| window(at, drift)).collect::<Vec<_>>()).lasts();
    assert!(
        lasts(0) > 60.0 && lasts(4000) < lasts(0) && lasts(40_000) < lasts(4000),
        "{} {}",
        lasts(4000),
        lasts(40_000)
    );
    let mut forecast = seen(&vec![vec![900.0, 50.0, 50.0]; 4]);
    let before = forecast.lasts();
    forecast.observe(&[vec![50.0, 50.0, 900.0]]);
    assert!(forecast.lasts() <= 4.0 && before > 4.0, "one switch in four windows");
}

#[test]
fn what_is_no_load_is_named_and_the_last_good_window_stands_in() {
    let mut forecast = seen(&[vec![600.0, 300.0, 100.0]]);
    let bad = forecast.observe(&[vec![1.0, f64::NAN, -3.0]]);
    assert_eq!(bad.iter().map(|bad| (bad.layer, bad.expert)).collect::<Vec<_>>(), vec![(0, 1), (0, 2)]);
    assert!(bad[1].to_string().contains("layer 0, expert 2: load -3"), "{}", bad[1]);
    assert_eq!(forecast.tokens().unwrap(), vec![vec![600, 300, 100]]);
    assert_eq!(forecast.observe(&[]).len(), 3, "an absent layer counts as not a number");
}

#[test]
fn nothing_seen_is_nothing_expected() {
    assert_eq!(Forecast::new(vec![3]).expect(), None);
    assert_eq!(seen(&[vec![0.0; 3]]).tokens().unwrap(), vec![vec![0, 0, 0]]);
}
