//! The descriptor behind the kernel log: /dev/kmsg, where one read is one record, or a file or pipe with
//! the same records one after the other, which is how a node without a kernel of its own is watched.
//!
//! It waits in poll(2) only, so that a record is seen at once and an end is too.

use std::{
    collections::VecDeque,
    fs::{File, OpenOptions},
    io::{self, PipeReader, Read as _},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    path::Path,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::inotify::{AddWatchFlags, InitFlags, Inotify},
};

use super::kmsg::{KernelLog, RECORD_LIMIT, Read};

/// A kernel log on a descriptor.
#[derive(Debug)]
pub struct Tail {
    file: File,
    /// One read is one record.
    device: bool,
    /// Tells that a plain file grew; poll(2) would say so always.
    growth: Option<Inotify>,
    stop: PipeReader,
    ready: VecDeque<Vec<u8>>,
    partial: Vec<u8>,
    caught_up: bool,
}

impl Tail {
    /// Opens `path`. The reading ends when the other end of `stop` is closed.
    ///
    /// # Errors
    /// What the system says; a container needs the right to read /dev/kmsg.
    pub fn open(path: &Path, stop: PipeReader) -> io::Result<Self> {
        let file_type = std::fs::metadata(path)?.file_type();
        let mut options = OpenOptions::new();
        // A pipe without a writer would end at once: this process holds it open for writing too.
        options.read(true).write(file_type.is_fifo()).custom_flags(libc::O_NONBLOCK);
        let file = options.open(path)?;
        let growth = if file_type.is_file() {
            let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
            inotify.add_watch(path, AddWatchFlags::IN_MODIFY)?;
            Some(inotify)
        } else {
            None
        };
        let device = file_type.is_char_device();
        Ok(Self { file, device, growth, stop, ready: VecDeque::new(), partial: Vec::new(), caught_up: false })
    }

    /// Reads once; `false` = nothing new.
    fn fill(&mut self) -> io::Result<bool> {
        let mut buffer = [0; RECORD_LIMIT];
        let read = match self.file.read(&mut buffer) {
            Ok(0) => return Ok(false),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error),
        };
        let bytes = buffer.get(..read).unwrap_or_default();
        if self.device {
            self.ready.push_back(bytes.to_vec());
            return Ok(true);
        }
        self.partial.extend_from_slice(bytes);
        while let Some(end) = self.partial.iter().position(|byte| *byte == b'\n') {
            let rest = self.partial.split_off(end.saturating_add(1));
            let line = std::mem::replace(&mut self.partial, rest);
            // Lines of ` KEY=value` belong to the record before, and say nothing that is needed.
            if !line.starts_with(b" ") {
                self.ready.push_back(line);
            }
        }
        if self.partial.len() > RECORD_LIMIT {
            self.partial.clear();
        }
        Ok(true)
    }

    /// Waits for growth; `false` = told to end.
    fn wait(&self) -> io::Result<bool> {
        let source: BorrowedFd<'_> = self.growth.as_ref().map_or(self.file.as_fd(), AsFd::as_fd);
        let mut fds = [PollFd::new(source, PollFlags::POLLIN), PollFd::new(self.stop.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        if let Some(growth) = &self.growth {
            // Emptied; what it says is only that there is something to read.
            let _ = growth.read_events();
        }
        let [_, stop] = &fds;
        Ok(stop.revents().is_none_or(|events| events.is_empty()))
    }
}

impl KernelLog for Tail {
    fn read(&mut self) -> io::Result<Read> {
        loop {
            if let Some(record) = self.ready.pop_front() {
                return Ok(Read::Record(record, None));
            }
            match self.fill() {
                Ok(true) => {}
                Ok(false) if !self.caught_up => {
                    self.caught_up = true;
                    return Ok(Read::CaughtUp);
                }
                Ok(false) => {
                    if !self.wait()? {
                        return Ok(Read::Ended);
                    }
                }
                Err(error) if matches!(error.raw_os_error(), Some(libc::EPIPE | libc::EINVAL)) => {
                    return Ok(Read::Lost(None));
                }
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{io::Write, sync::mpsc, thread, time::Duration};

    fn records(mut tail: Tail) -> mpsc::Receiver<String> {
        let (tell, told) = mpsc::channel();
        thread::spawn(move || {
            loop {
                let said = match tail.read().unwrap() {
                    Read::Record(bytes, _) => String::from_utf8(bytes).unwrap(),
                    Read::CaughtUp => "caught up".to_owned(),
                    Read::Lost(_) => "lost".to_owned(),
                    Read::Ended => return,
                };
                tell.send(said).unwrap();
            }
        });
        told
    }

    fn next(told: &mpsc::Receiver<String>) -> String {
        told.recv_timeout(Duration::from_secs(10)).unwrap()
    }

    #[test]
    fn a_growing_file_gives_old_records_then_new_ones_whole() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"4,1,2,-;old\n SUBSYSTEM=pci\n").unwrap();
        let (end, stop) = io::pipe().unwrap();
        let tail = Tail::open(file.path(), end).unwrap();
        let told = records(tail);
        assert_eq!((next(&told), next(&told)), ("4,1,2,-;old\n".to_owned(), "caught up".to_owned()));
        file.write_all(b"4,2,3,-;ne").unwrap();
        file.write_all(b"w\n4,3,4,-;next\n").unwrap();
        assert_eq!((next(&told), next(&told)), ("4,2,3,-;new\n".to_owned(), "4,3,4,-;next\n".to_owned()));
        drop(stop);
        assert!(told.recv_timeout(Duration::from_secs(10)).is_err());
    }

    #[test]
    fn a_pipe_is_read_as_it_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kmsg");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let (end, stop) = io::pipe().unwrap();
        let tail = Tail::open(&path, end).unwrap();
        let told = records(tail);
        assert_eq!(next(&told), "caught up");
        OpenOptions::new().write(true).open(&path).unwrap().write_all(b"4,1,2,-;x\n").unwrap();
        assert_eq!(next(&told), "4,1,2,-;x\n");
        drop(stop);
        assert!(told.recv_timeout(Duration::from_secs(10)).is_err());
    }
}
