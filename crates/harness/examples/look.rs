//! Writes what is on the screen of a desktop: `look ADDRESS:PORT FILE.png [click:X,Y:B | move:X,Y | hold:X,Y | type:TEXT | ctrl:C | wait:MS]…`.
use harness::{
    lab::Netns,
    viewer::{Viewer, keys},
};
fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let viewer = Viewer::connect(&Netns::current()?, arguments[1].parse()?)?;
    for action in &arguments[3..] {
        let parts: Vec<&str> = action.splitn(3, ':').collect();
        let at = |i: usize| {
            let (x, y) = parts[i].split_once(',').unwrap();
            (x.parse().unwrap(), y.parse().unwrap())
        };
        match parts[0] {
            "click" => viewer.click(at(1), parts[2].parse()?)?,
            "move" => viewer.mouse(at(1), None)?,
            "hold" => viewer.mouse(at(1), Some(1))?,
            "type" => viewer.type_text(parts[1])?,
            "ctrl" => viewer.press(&[keys::CONTROL, keys::of(parts[1].chars().next().unwrap())])?,
            "wait" => std::thread::sleep(std::time::Duration::from_millis(parts[1].parse()?)),
            _ => panic!("{action}"),
        }
    }
    viewer.refresh()?.write_png(arguments[2].as_ref())
}
